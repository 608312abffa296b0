"""The API's error responses."""

from __future__ import annotations

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from sqlalchemy.exc import SQLAlchemyError

from llmrun.errors import LLMRunError, Refused
from llmrun_runtime.control.state.connection import describe_error


def add_error_handlers(api: FastAPI) -> None:
    """Turn exceptions into `{"error": {"message": …}}`."""

    @api.exception_handler(LLMRunError)
    async def refused(_: Request, error: LLMRunError) -> JSONResponse:
        return _response(error.status if isinstance(error, Refused) else 409, str(error))

    @api.exception_handler(SQLAlchemyError)
    async def database_failed(_: Request, error: SQLAlchemyError) -> JSONResponse:
        return _response(503, describe_error(error))

    @api.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> JSONResponse:
        text = f"internal error in control ({type(error).__name__}: {error})"
        return _response(500, f"{text}. See logs/control.log in the head node's LLMRUN_HOME")

    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        return _response(422, f"{field}: {first['msg']}")


def _response(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": {"message": message}}, status)
