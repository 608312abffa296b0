"""`llmrun chat`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import httpx
import typer

from llmrun.errors import ControlError
from llmrun.settings import Settings
from llmrun_cli.client import CONNECT_TIMEOUT_S, to_error, unreachable
from llmrun_cli.credentials import api_credentials, trusted
from llmrun_cli.terminal import exit_on_interrupt, note, write


def chat(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Model name.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="A single prompt. Without it, start a conversation.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(metavar="N", help="Maximum tokens per reply.", min=1)] = 512,
    temperature: Annotated[
        float | None, typer.Option(metavar="T", help="Sampling temperature. 0 gives the same reply each time.", min=0)
    ] = None,
) -> None:
    """Chat with a model.

    Streams the replies. A cold model wakes first.
    """
    settings = Settings()
    http = httpx.Client(
        base_url=settings.resolved_url(),
        auth=api_credentials(settings),
        timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S),
        trust_env=False,
        verify=trusted(settings),
    )
    options: dict[str, Any] = {"model": model, "max_tokens": max_tokens}
    if temperature is not None:
        options["temperature"] = temperature
    with exit_on_interrupt():
        try:
            _converse(http, options, prompt)
        except EOFError:
            print()
        except KeyboardInterrupt:
            print()
            raise


def _converse(http: httpx.Client, options: dict[str, Any], prompt: str | None) -> None:
    """Answer the prompt, or prompts from standard input until its end. Raises ControlError."""
    messages: list[dict[str, str]] = []
    while True:
        text = prompt if prompt is not None else input("> ")
        if text.strip():
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": _reply(http, {**options, "messages": messages})})
        if prompt is not None:
            return


def _reply(http: httpx.Client, body: dict[str, Any]) -> str:
    """Stream a reply to standard output; return it. Raises ControlError."""
    reply = ""
    try:
        _note_if_cold(http, body["model"])
        with http.stream("POST", "/v1/chat/completions", json={**body, "stream": True}) as response:
            if response.is_error:
                response.read()
                raise to_error(response)
            for line in response.iter_lines():
                if line.startswith(": "):  # a keepalive comment with the model's state
                    note(line[2:], "dim")
                data = line.removeprefix("data: ")
                if line.startswith("data: ") and data != "[DONE]":
                    event = json.loads(data)
                    if "error" in event:
                        raise ControlError(event["error"]["message"])
                    for choice in event["choices"]:
                        piece = choice["delta"].get("content") or ""
                        reply += piece
                        write(piece)
    except httpx.RemoteProtocolError as error:
        raise ControlError(f"the reply was cut off ({error}): see `llmrun logs {body['model']}`") from error
    except httpx.HTTPError as error:
        raise unreachable(str(http.base_url), error) from error
    print()
    return reply


def _note_if_cold(http: httpx.Client, model: str) -> None:
    """Print a note if the model has to start first. Raises httpx.HTTPError."""
    response = http.get(f"/v1/models/{model}", timeout=5)
    if response.is_success and (state := response.json().get("llmrun", {}).get("state")) not in ("hot", None):
        note(f"{model} is {state}. Waiting for its engine to start.", "dim")
