"""Multipart forms, as audio is sent: hooks change the fields, the files stay as they are."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import python_multipart
from python_multipart.multipart import parse_options_header

from llmrun.errors import HookError

NEWLINE = b"\r\n"


@dataclass
class Part:
    """One part of a form, as it was sent."""

    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    content: bytearray = field(default_factory=bytearray)

    def options(self) -> dict[bytes, bytes]:
        """Return the options of its `Content-Disposition`: `name`, and `filename` if it is a file."""
        for name, value in self.headers:
            if name.lower() == b"content-disposition":
                return parse_options_header(value)[1]
        return {}


@dataclass
class Form:
    """A form's fields, where a repeated one is a list, and its files."""

    fields: dict[str, Any]
    files: list[Part]

    @classmethod
    def parse(cls, content_type: bytes, body: bytes) -> Form | None:
        """Return the form in a body; None if its content type is another one. Raises ValueError."""
        kind, options = parse_options_header(content_type)
        if kind != b"multipart/form-data" or b"boundary" not in options:
            return None
        form = cls({}, [])
        for part in _parts(options[b"boundary"], body):
            name = part.options()
            if b"filename" in name:
                form.files.append(part)
            else:
                form._add(name.get(b"name", b"").decode(), part.content.decode())
        return form

    def encode(self, fields: Mapping[str, Any]) -> tuple[bytes, bytes]:
        """Return the content type and the body of a form with these fields and the same files. Raises HookError."""
        boundary = secrets.token_hex(16).encode()
        body = bytearray()
        for name, text in _texts(fields):
            disposition = b'form-data; name="' + _escaped(name) + b'"'
            _append(body, boundary, [(b"Content-Disposition", disposition)], text.encode())
        for part in self.files:
            _append(body, boundary, part.headers, part.content)
        body += b"--" + boundary + b"--" + NEWLINE
        return b"multipart/form-data; boundary=" + boundary, bytes(body)

    def _add(self, name: str, text: str) -> None:
        if name not in self.fields:
            self.fields[name] = text
        elif isinstance(self.fields[name], list):
            self.fields[name].append(text)
        else:
            self.fields[name] = [self.fields[name], text]


def _parts(boundary: bytes, body: bytes) -> list[Part]:
    parts: list[Part] = []
    header: tuple[bytearray, bytearray] = (bytearray(), bytearray())

    def on_header_end() -> None:
        parts[-1].headers.append((bytes(header[0]), bytes(header[1])))
        header[0].clear()
        header[1].clear()

    parser = python_multipart.MultipartParser(
        boundary,
        {
            "on_part_begin": lambda: parts.append(Part()),
            "on_header_field": lambda data, start, end: header[0].extend(data[start:end]),
            "on_header_value": lambda data, start, end: header[1].extend(data[start:end]),
            "on_header_end": on_header_end,
            "on_part_data": lambda data, start, end: parts[-1].content.extend(memoryview(data)[start:end]),
        },
    )
    parser.write(body)
    parser.finalize()
    return parts


def _append(body: bytearray, boundary: bytes, headers: list[tuple[bytes, bytes]], content: bytes | bytearray) -> None:
    body += b"--" + boundary + NEWLINE
    for name, value in headers:
        body += name + b": " + value + NEWLINE
    body += NEWLINE
    body += content
    body += NEWLINE


def _texts(fields: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in fields.items():
        for item in value if isinstance(value, list) else [value]:
            if isinstance(item, bool):
                yield name, "true" if item else "false"
            elif isinstance(item, str | int | float):
                yield name, str(item)
            elif item is not None:
                raise HookError(
                    f"on_request returned {type(item).__name__} for the field {name!r} of a form: a field is a text, a "
                    f"number, or a list of them"
                )


def _escaped(name: str) -> bytes:
    """Return a field's name as browsers write it (WHATWG HTML, multipart form data)."""
    return name.encode().replace(b"\r", b"%0D").replace(b"\n", b"%0A").replace(b'"', b"%22")
