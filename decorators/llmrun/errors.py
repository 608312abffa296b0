"""Every error that a person can meet.

LLMRunError                what happened, why, what to type
├── SpecError              an `@llm` is wrong: names the argument, the value and the fix
├── AppError               an app file is missing, broken or holds no model
├── ControlError           control is away, or refused what was asked
│   ├── Unreachable        nothing answers at the URL
│   └── Refused            control said no; `.status` is the HTTP status
├── DeployError            a model did not start; the message is the engine's own root cause
├── ClusterError           a cluster cannot be started, found or stopped
├── WeightsError           weights cannot be found, fetched, checked or kept; names the source and the node
│   └── NotThere           the source answers, and has no such thing
├── EngineError            an engine did not start or died; the message is one line
├── RequestError           a model refused a request, or failed at it; `.status` and `.body` are its answer
└── HookError              a hook raised, took too long or answered with no request; names it
"""

from __future__ import annotations

from typing import Any


class LLMRunError(Exception):
    """The base of all: its text is one line for a person."""


class SpecError(LLMRunError, ValueError):
    """An `@llm` definition is wrong."""


class AppError(LLMRunError):
    """An app file cannot be used; `detail` is the user's own traceback, if there is one."""

    def __init__(self, message: str, detail: str = "") -> None:
        super().__init__(message)
        self.detail = detail


class ControlError(LLMRunError):
    """Control could not do what was asked."""


class Unreachable(ControlError):
    """Nothing answers at the URL."""


class Refused(ControlError):
    """llmrun answered with an error; `status` is its HTTP status, `code` its error's code where it has one."""

    def __init__(self, message: str, status: int, code: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class DeployError(LLMRunError):
    """A deployed model did not start."""


class ClusterError(LLMRunError):
    """A cluster cannot be started, found or stopped."""


class WeightsError(LLMRunError):
    """Weights cannot be found, fetched, checked or kept."""


class NotFound(WeightsError):
    """The source answers, and has no such thing."""


class EngineError(LLMRunError):
    """An engine did not start, or died."""


class RequestError(LLMRunError):
    """A model refused a request, or failed at it: `status` is the HTTP status, `body` what it said, JSON or text."""

    def __init__(self, message: str, status: int, body: Any) -> None:
        super().__init__(message)
        self.status = status
        self.body = body

    def __reduce__(self) -> tuple[type, tuple[str, int, Any]]:
        """It goes from the model's process to the caller's."""
        return type(self), (str(self), self.status, self.body)


class HookError(LLMRunError):
    """A hook raised, took too long or answered with something that is no request."""
