"""`Assistant.deploy()`: what the method that `@llm` gives a class does."""

from __future__ import annotations

import inspect
from dataclasses import dataclass

from llmrun.app_file import is_loading
from llmrun.decorator import spec_of
from llmrun.errors import AppError
from llmrun.settings import Settings
from llmrun_cli.commands.deploy import deploy


@dataclass(frozen=True)
class Deployment:
    """A model that answers: OpenAI's clients take `base_url=f"{url}/v1"` and `model`."""

    model: str
    url: str


def deploy_class(cls: type) -> Deployment:
    """Deploy one class of its file, as `llmrun deploy FILE::Class --yes`; on a terminal it says how it goes.

    Raises LLMRunError.
    """
    if is_loading():
        raise AppError(
            f"{cls.__name__}.deploy() runs when its file is imported: put it under `if __name__ == '__main__':`"
        )
    spec = spec_of(cls)
    assert spec
    try:
        file = inspect.getfile(cls)
    except (TypeError, OSError):
        raise AppError(f"{cls.__name__} is in no file, which nodes could be sent: write it into one") from None
    deploy(f"{file}::{cls.__qualname__}", yes=True)
    return Deployment(spec.name, Settings().resolved_url())
