"""Where a model's weights lie: a source's name and the options that belong to it.

Knows how sources are written; fetches nothing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, SerializerFunctionWrapHandler, model_serializer

from llmrun.errors import SpecError

PATH_PREFIXES = ("/", "./", "~", "file://")
# What the Hub takes as a name: https://huggingface.co/docs/hub/repositories-getting-started
HUB_NAME = re.compile(r"(?:[A-Za-z0-9][\w.-]*/)?[A-Za-z0-9][\w.-]{0,95}")
PROTOCOL = re.compile(r"[a-z][a-z0-9+.-]*")
ANONYMOUS = "anonymous@"
Kind = Literal["path", "hub", "store"]


def is_path(source: str) -> bool:
    """Whether `source` names a place on disk."""
    return source.startswith(PATH_PREFIXES)


class Weights(BaseModel):
    """A source of weights, with the options that belong to it.

    Args:
        source: `org/name` or `org/name@revision` of Hugging Face (also `hf://…`); `s3://bucket/path`,
            `gs://bucket/path` (with `anonymous@` before the bucket: without credentials) or any other address that an
            fsspec package knows; or a path (`/…`, `./…`, `~…`, `file://…`), which is used in place.
        include: patterns of the files to take (`*` matches `/` too); by default what an engine needs.
        exclude: patterns of files to leave out of those.
        endpoint_url: another address of the store's API (S3, GCS) or of the Hub.
        anonymous: ask the store without credentials.

    Raises:
        SpecError: the source is written wrong, or an option does not belong to it.
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
            raise SpecError(f'model={source!r}: name the weights, like "org/model" or "./folder"')
        for name, patterns in (("include", include), ("exclude", exclude)):
            if isinstance(patterns, str) or not all(isinstance(item, str) and item for item in patterns):
                raise SpecError(f'{name}={patterns!r}: write a list of patterns, like {name}=["*.safetensors"]')
        if endpoint_url and not endpoint_url.startswith(("http://", "https://")):
            raise SpecError(f"endpoint_url={endpoint_url!r}: an address begins with http:// or https://")
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
                raise SpecError(f"model={self.source!r}: a path is used in place as it is: options do not go with it")
        elif self.kind == "hub":
            if self.source.startswith("."):
                raise SpecError(f"model={self.source!r}: a path begins with '/', './', '~' or 'file://'")
            name, at, revision = self.address.partition("@")
            if not HUB_NAME.fullmatch(name) or (at and not revision):
                raise SpecError(
                    f"model={self.source!r}: a model of Hugging Face is org/name or org/name@revision; "
                    f"a path begins with '/', './', '~' or 'file://'"
                )
        elif not PROTOCOL.fullmatch(self.protocol) or not self.address.strip("/"):
            raise SpecError(f"model={self.source!r}: an address is like s3://bucket/path")

    @model_serializer(mode="wrap")
    def _plain(self, handler: SerializerFunctionWrapHandler) -> Any:
        """A source without options is its name."""
        data = handler(self)
        said = {key: value for key, value in data.items() if value and key != "source"}
        if _authority(self.source).startswith(ANONYMOUS):
            said.pop("anonymous", None)
        return {"source": self.source, **said} if said else self.source

    @property
    def kind(self) -> Kind:
        """`path`: on a node, used in place; `hub`: Hugging Face; `store`: an fsspec address."""
        if is_path(self.source):
            return "path"
        return "hub" if self.protocol == "hf" else "store"

    @property
    def protocol(self) -> str:
        """`hf`, `s3`, `gs`, …; `file` for a path."""
        if is_path(self.source):
            return "file"
        protocol, found, _ = self.source.partition("://")
        return protocol if found else "hf"

    @property
    def address(self) -> str:
        """What is after the protocol, without `anonymous@` and a last `/`: `bucket/path`, `org/name@revision`."""
        _, found, rest = self.source.partition("://")
        return (rest if found else self.source).removeprefix(ANONYMOUS).rstrip("/")

    @property
    def repo(self) -> str:
        """`org/name` of a source on the Hub."""
        return self.address.partition("@")[0]

    @property
    def revision(self) -> str:
        """The revision that was asked for on the Hub, by default `main`."""
        return self.address.partition("@")[2] or "main"

    @property
    def path(self) -> str | None:
        """The place on disk, if the source is a path."""
        return self.source.removeprefix("file://") if self.kind == "path" else None

    @property
    def canonical(self) -> str:
        """The source in one way of writing it: two that name the same are equal."""
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
    """What `@llm`, YAML and JSON may say for `model=`: a source's name, or an object with options. For pydantic."""
    if isinstance(value, str):
        return Weights(value)
    if isinstance(value, dict):
        unknown = set(value) - set(Weights.model_fields)
        if unknown or "source" not in value:
            raise SpecError(f"model={value!r}: known are {', '.join(Weights.model_fields)}")
        return Weights(**value)
    return value


AnyWeights = Annotated[Weights, BeforeValidator(as_weights)]
"""For fields of messages and specs: takes a source's name, too."""
