"""The errors of requests that wait for a replica."""

from __future__ import annotations

import math

from llmrun_runtime.ingress.errors import NOT_READY, HTTPError
from llmrun_runtime.wire.routing_table import ModelRoute

DEFAULT_RETRY_AFTER_S, MAX_RETRY_AFTER_S = 10, 120
SHUTDOWN_RETRY_AFTER_S = 5
# Shorter waits are not worth mentioning in a message.
_NO_WAIT_S = 0.05


def retry_after(model: ModelRoute, waited: float = 0) -> int:
    """Return whole seconds until the model is probably ready, based on its earlier starts."""
    return math.ceil(min(max(1, (model.usual_start or DEFAULT_RETRY_AFTER_S) - waited), MAX_RETRY_AFTER_S))


def queue_full(model: ModelRoute, waiting: int) -> HTTPError:
    """The error for a request that found no place in the queue."""
    message = f"the queue of {model.name} is full: {waiting} requests are waiting (max_queued)"
    return HTTPError(429, message, "queue_full", "rate_limit_error", retry_after=retry_after(model))


def start_failed(model: ModelRoute) -> HTTPError:
    """The error for a model whose start failed."""
    message, code = f"{model.name} failed to start", "model_failed"
    return HTTPError(503, message, code, "service_unavailable", retry_after=retry_after(model), cause=model.cause)


def shutting_down() -> HTTPError:
    """The error for a request that has no replica yet when its ingress stops."""
    message = "llmrun is shutting down. Retry when it is running again"
    return HTTPError(503, message, "shutting_down", "service_unavailable", retry_after=SHUTDOWN_RETRY_AFTER_S)


def wait_timed_out(model: ModelRoute, waited: float, source: str) -> HTTPError:
    """The error after `waited` seconds; `source` is the header or setting that limits the wait."""
    if waited <= _NO_WAIT_S:
        message = f"{model.name} has no free replica" if model.replicas else f"{model.name} is not ready"
    else:
        status = f"waiting for a free replica of {model.name}" if model.replicas else f"{model.name} was starting"
        message = f"timed out after {waited:.3g} s while {status}" + (f" ({source})" if source else "")
    if model.phase and not model.cause:
        message += f": {model.phase}"
    retry = retry_after(model, waited)
    return HTTPError(503, message, NOT_READY, "service_unavailable", retry_after=retry, cause=model.cause)
