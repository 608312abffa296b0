"""Where a model's weights are stored: the name of a source, and its options.

Parses and validates only; it fetches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from llmrun.errors import SpecError

PATH_PREFIXES = ("/", "./", "~", "file://")
# Repository names on the Hub: https://huggingface.co/docs/hub/repositories-getting-started
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*")
ANONYMOUS = "anonymous@"
Kind = Literal["path", "hub", "store"]


def is_path(source: str) -> bool:
    """Whether `source` is a path on disk."""
    return source.startswith(PATH_PREFIXES)


class Weights(BaseModel):
    """A source of weights, with options.

    Args:
        source: `org/name` or `org/name@revision` on Hugging Face (also `hf://…`); an address in an object store,
            `s3://bucket/path` or `gs://bucket/path` (`s3://anonymous@bucket/path`: without credentials), or any other
            address that an installed fsspec package supports; or a path (`/…`, `./…`, `~…`, `file://…`), which is used
            in place.
        include: Patterns of the files to download; `*` matches `/`, too. By default the files that an engine needs:
            configuration, tokenizer, chat template, code and safetensors (`*.bin` only if there are none).
        exclude: Patterns of files to leave out of those.
        endpoint_url: The URL of the API, for S3-compatible stores and for mirrors of the Hub.
        anonymous: Whether to access an object store without credentials.

    Raises:
        SpecError: the source is invalid, or an option does not apply to it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    source: str
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    endpoint_url: str = ""
    anonymous: bool = False

    def __init__(
        self,
        source: str,
        *,
        include: Sequence[str] = (),
        exclude: Sequence[str] = (),
        endpoint_url: str = "",
        anonymous: bool = False,
    ) -> None:
        if not isinstance(source, str) or not source.strip():
            raise SpecError(f'model={source!r}: must be a source of weights, like "org/model" or "./folder"')
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str) or not all(isinstance(item, str) and item for item in patterns):
                raise SpecError(f'{name}={patterns!r}: must be a list of patterns, like {name}=["*.safetensors"]')
        if endpoint_url and not endpoint_url.startswith(("http://", "https://")):
            raise SpecError(f"endpoint_url={endpoint_url!r}: must start with http:// or https://")
        super().__init__(
            source=source,
            include=tuple(include),
            exclude=tuple(exclude),
            endpoint_url=endpoint_url.rstrip("/"),
            anonymous=anonymous or _authority(source).startswith(ANONYMOUS),
        )
        self._check()

    def _check(self) -> None:
        if self.kind == "path":
            if self.include or self.exclude or self.endpoint_url or self.anonymous:
                raise SpecError(f"model={self.source!r}: options are not supported for a path, which is used in place")
        elif self.kind == "hub":
            if self.source.startswith("."):
                raise SpecError(f"model={self.source!r}: a path must start with '/', './', '~' or 'file://'")
            name, at, revision = self.address.partition("@")
            if not HUB_NAME.fullmatch(name) or (at and not revision):
                raise SpecError(
                    f"model={self.source!r}: must be org/name or org/name@revision on Hugging Face; "
                    f"a path must start with '/', './', '~' or 'file://'"
                )
        elif not PROTOCOL.fullmatch(self.protocol) or not self.address.strip("/"):
            raise SpecError(f"model={self.source!r}: must be an address like s3://bucket/path")

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> Any:
        """Serialize a source without options as its name."""
        data = handler(self)
        options = {key: value for key, value in data.items() if value and key != "source"}
        if _authority(self.source).startswith(ANONYMOUS):
            options.pop("anonymous", None)
        return {"source": self.source, **options} if options else self.source

    @property
    def kind(self) -> Kind:
        """`path`: on a node's disk, used in place; `hub`: Hugging Face; `store`: an fsspec address."""
        if is_path(self.source):
            return "path"
        return "hub" if self.protocol == "hf" else "store"

    @property
    def protocol(self) -> str:
        """`hf`, `s3`, `gs`, …; `file` for a path."""
        if is_path(self.source):
            return "file"
        protocol, separator, _ = self.source.partition("://")
        return protocol if separator else "hf"

    @property
    def address(self) -> str:
        """The part after the protocol, without `anonymous@` and a trailing `/`: `bucket/path`, `org/name@revision`."""
        _, separator, rest = self.source.partition("://")
        return (rest if separator else self.source).removeprefix(ANONYMOUS).rstrip("/")

    @property
    def repo(self) -> str:
        """The `org/name` of a source on the Hub."""
        return self.address.partition("@")[0]

    @property
    def revision(self) -> str:
        """The revision of a source on the Hub, by default `main`."""
        return self.address.partition("@")[2] or "main"

    @property
    def path(self) -> str | None:
        """The path on disk, or None for other sources."""
        return self.source.removeprefix("file://") if self.kind == "path" else None

    @property
    def canonical(self) -> str:
        """The source in a normal form: equal for two spellings of the same source."""
        if self.kind == "path":
            return self.path or ""
        return (
            f"{self.protocol}://{self.repo}@{self.revision}"
            if self.kind == "hub"
            else f"{self.protocol}://{self.address}"
        )

    def __str__(self) -> str:
        return self.source


def _authority(source: str) -> str:
    return source.partition("://")[2]


def as_weights(value: Any) -> Any:
    """Turn a value of `model=` (a source's name, or a mapping with options) into Weights, for pydantic.

    Raises SpecError.
    """
    if isinstance(value, str):
        return Weights(value)
    if isinstance(value, dict):
        unknown = set(value) - set(Weights.model_fields)
        if unknown or "source" not in value:
            problem = f"unknown option {min(unknown, key=str)!r}" if unknown else "source is required"
            raise SpecError(f"model={value!r}: {problem}; available: {', '.join(Weights.model_fields)}")
        return Weights(**value)
    return value


AnyWeights = Annotated[Weights, BeforeValidator(as_weights)]
"""The type for fields of messages and specs: accepts a source's name, too."""
