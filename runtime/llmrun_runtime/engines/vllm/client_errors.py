"""Has vLLM report a client's mistakes as such: with 400, and in one sentence that names the field."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from PIL import Image
from pydantic import ValidationError
from starlette.responses import JSONResponse
from vllm.entrypoints.launchers import app
from vllm.entrypoints.serve.exception_handling import error_response, register
from vllm.entrypoints.serve.exception_handling.handlers.exception import exception_handler
from vllm.exceptions import VLLMValidationError
from vllm.multimodal.media.connector import MediaConnector

from llmrun_runtime.asgi import error_body
from llmrun_runtime.engines.shim import usage_meter
from llmrun_runtime.engines.vllm.validation import explain

CREATE = "create_error_response"
UNREAD = (LookupError, AttributeError)
LOCAL_FILE = "local files are not read: send the file itself, as a data URL"


def report_client_errors() -> None:
    """Replace vLLM's handler of validation errors, and what turns its exceptions into responses, once."""
    if register.validation_exception_handler is _on_invalid_request:
        return
    register.validation_exception_handler = _on_invalid_request
    original = error_response.create_error_response
    explained = _explained(original)
    for module in list(sys.modules.values()):  # vLLM's modules import it by name
        if getattr(module, "__name__", "").startswith("vllm.") and vars(module).get(CREATE) is original:
            setattr(module, CREATE, explained)
    app.init_exception_handler = _with_unread_requests(app.init_exception_handler)
    MediaConnector.load_from_url = _loading(MediaConnector.load_from_url)
    MediaConnector.load_from_url_async = _loading_async(MediaConnector.load_from_url_async)


def _with_unread_requests(original: Callable[[FastAPI], None]) -> Callable[[FastAPI], None]:
    """Have these exceptions handled where the request is still known: inside the shim, not by the outermost handler."""

    @functools.wraps(original)
    def init(app: FastAPI) -> None:
        original(app)
        for kind in UNREAD:
            app.exception_handler(kind)(exception_handler)

    return init


async def _on_invalid_request(_: Request, error: RequestValidationError) -> JSONResponse:
    message, field = explain(error.errors(), error.body)
    return JSONResponse(error_body(message, "invalid_request_error", "invalid_request", field or None), 400)


def _explained(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def create(message: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(message, ValidationError):
            text, field = explain([dict(error) for error in message.errors()])
            message = VLLMValidationError(text, parameter=field or None)
        elif isinstance(message, UNREAD) and _is_reading():
            # As ValueError and TypeError are for vLLM.
            message = VLLMValidationError(f"the engine cannot read this request: {type(message).__name__}: {message}")
        return original(message, *args, **kwargs)

    return create


def _is_reading() -> bool:
    """Whether the current request has not reached the engine yet."""
    request = usage_meter.current()
    return request is not None and not request.reached_engine


def _loading(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(self: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return original(self, url, *args, **kwargs)
        except Exception as error:
            raise _not_loaded(self, url, error) from error

    return load


def _loading_async(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    async def load(self: Any, url: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return await original(self, url, *args, **kwargs)
        except Exception as error:
            raise _not_loaded(self, url, error) from error

    return load


def _not_loaded(connector: Any, url: Any, error: Exception) -> Exception:
    """Return the error for an image, audio or video that cannot be loaded.

    A file that is not allowed or not there, an unknown encoding, or a decompression bomb is the client's mistake, which
    vLLM does not know. What it knows, and what the network did, stays as it is.
    """
    if str(url).startswith("file:"):
        return error if isinstance(error, ValueError) else ValueError(_file_problem(connector, error))
    is_mistake = isinstance(error, Image.DecompressionBombError | NotImplementedError | RuntimeError)
    return ValueError(f"cannot load the media: {error}") if is_mistake else error


def _file_problem(connector: Any, error: Exception) -> str:
    if getattr(connector, "allowed_local_media_path", None) is None:
        return LOCAL_FILE
    return f"cannot read the file: {getattr(error, 'strerror', None) or error}"
