"""`Assistant.deploy()`: the implementation of the method that `@llm` adds to a class."""

from __future__ import annotations

import inspect

from llmrun.app_file import is_loading
from llmrun.decorator import spec_of
from llmrun.deployment import Deployment
from llmrun.errors import AppError
from llmrun.settings import Settings
from llmrun_cli import deployment, local_cluster
from llmrun_cli.client import Client
from llmrun_cli.deploy_output import show_events, show_plan
from llmrun_cli.progress import starting_cluster
from llmrun_cli.terminal import out


def deploy_class(cls: type) -> Deployment:
    """Deploy one class of its file, as `llmrun deploy FILE::Class --yes` does, and show the progress.

    Raises LLMRunError.
    """
    if is_loading():
        raise AppError(f"{cls.__name__}.deploy() was called on import: call it under `if __name__ == '__main__':`")
    spec = spec_of(cls)
    if not spec:
        raise AppError(f"{cls.__name__} is not a model: put @llm on it")
    try:
        file = inspect.getfile(cls)
    except (TypeError, OSError):
        raise AppError(f"{cls.__name__} is not defined in a file: move it to a .py file to deploy it") from None
    settings = Settings()
    prepared = deployment.from_file(f"{file}::{cls.__qualname__}")
    local_cluster.ensure(settings, starting_cluster)
    client = Client(settings)
    plan = deployment.make_plan(client, prepared)
    show_plan(plan)
    if deployment.changed(plan):
        operation = deployment.start(client, prepared.request, plan)
        show_events(deployment.follow(client, operation), operation, client.url)
    else:
        out.print(f"{plan.app}: no changes")
    return Deployment(spec.name, client.url)
