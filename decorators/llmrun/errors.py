"""Every error that a user can see.

LLMRunError                the base class; the message is what failed, why, and what to do
├── SpecError              an `@llm` definition is invalid: names the argument, the value and the fix
├── AppError               an app file is missing, broken or contains no model
├── ControlError           control is not reachable, or rejected a request
│   ├── Unreachable        no connection to the URL
│   └── Refused            control answered with an error; `.status` is the HTTP status
├── DeployError            a model did not start; the message is the engine's root cause
├── ClusterError           a cluster cannot be started, found or stopped
├── BackupError            a backup cannot be written or restored
├── WeightsError           weights cannot be found, downloaded, verified or stored; names the source and the node
│   └── NotFound           the source is reachable, but has no such repository, revision or file
├── EngineError            an engine did not start, or died; the message is one line
├── RequestError           a model refused or failed a request; `.status` and `.body` are its response
└── HookError              a hook raised an exception, timed out or returned no request; names the hook
"""

from __future__ import annotations

from typing import Any


class LLMRunError(Exception):
    """The base class of llmrun's errors. The message is one line for a person."""


class SpecError(LLMRunError, ValueError):
    """An `@llm` definition is invalid."""


class AppError(LLMRunError):
    """An app file cannot be used. `detail` is the traceback of the user's own code, or ""."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class ControlError(LLMRunError):
    """Control could not carry out a request."""


class Unreachable(ControlError):
    """No connection to the URL."""


class Refused(ControlError):
    """The response is an error. `status` is the HTTP status, `code` the error's code, or ""."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class DeployError(LLMRunError):
    """A deployed model did not start."""


class ClusterError(LLMRunError):
    """A cluster cannot be started, found or stopped."""


class BackupError(LLMRunError):
    """A backup cannot be written or restored."""


class WeightsError(LLMRunError):
    """Weights cannot be found, downloaded, verified or stored."""


class NotFound(WeightsError):
    """The source is reachable, but has no such repository, revision or file."""


class EngineError(LLMRunError):
    """An engine did not start, or died."""


class RequestError(LLMRunError):
    """A model refused or failed a request. `status` is the HTTP status, `body` the response's body, JSON or text."""

    def __init__(self, message: str, status: int, body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = body

    def __reduce__(self) -> tuple[type, tuple[str, int, Any]]:
        """Support pickling: the error is raised in the model's process and sent to the caller's."""
        return type(self), (str(self), self.status, self.body)


class HookError(LLMRunError):
    """A hook raised an exception, timed out or returned something other than a request."""
