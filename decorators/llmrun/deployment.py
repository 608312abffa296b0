"""Deploys a class with `@llm` from Python."""

from __future__ import annotations

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class Deployment:
    """A deployed model. OpenAI's clients use `base_url=f"{url}/v1"` and `model`."""

    model: str
    """The public name."""
    url: str
    """The ingress's URL, without `/v1`."""


def deploy(cls: type) -> Deployment:
    """Deploy the model of a class with `@llm`, as `llmrun deploy FILE::Class --yes` does, and wait until it answers.

    Starts a cluster on this machine if none is running. `Assistant.deploy()` is a shorthand for `deploy(Assistant)`
    that type checkers do not know. Raises LLMRunError.
    """
    # Imported by name and on demand: a file that only describes models needs no command line.
    deployment: Deployment = importlib.import_module("llmrun_cli.deploy_class").deploy_class(cls)
    return deployment
