"""Callers that behave as OpenAI's client does: they repeat a refused or unreachable request twice."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator
from typing import Any

import httpx

from tests.soak.ledger import Kind, Ledger, Outcome

TRIES = 3
ANSWER_S = 150.0  # longer than a request waits at the ingress, which must answer before
UNREACHABLE_S = 1.0


class Caller:
    """One caller: bursts of requests to one model, then a pause in which models may go to zero."""

    def __init__(self, url: str, models: list[str], ledger: Ledger, dice: random.Random) -> None:
        self._url, self._models, self._ledger, self._dice = url, models, ledger, dice

    async def run(self, stop: asyncio.Event) -> None:
        """Send requests until `stop` is set."""
        async with httpx.AsyncClient(timeout=ANSWER_S) as client:
            while not stop.is_set():
                model = self._dice.choice(self._models)
                for _ in range(self._dice.choice([1, 1, 3, 8])):
                    if not stop.is_set():
                        await self._request(client, model)
                pause = asyncio.create_task(stop.wait())
                await asyncio.wait([pause], timeout=self._dice.choice([0, 0.3, 1, 3, 8]))
                pause.cancel()

    async def _request(self, client: httpx.AsyncClient, model: str) -> None:
        tokens = self._dice.choice([1, 8, 8, 60, 200])
        body = {"model": model, "prompt": f"Number {self._dice.random()}", "max_tokens": tokens, "ignore_eos": True}
        streamed = self._dice.random() < 0.6
        for _ in range(TRIES):
            started = time.monotonic()
            kind, detail = await (self._stream(client, body) if streamed else self._whole(client, body))
            self._ledger.outcomes.append(Outcome(kind, model, started, time.monotonic(), detail))
            if kind not in ("refused", "unreachable"):
                return
            await asyncio.sleep(UNREACHABLE_S)

    async def _whole(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[Kind, str]:
        try:
            answer = await client.post(f"{self._url}/v1/completions", json=body)
        except httpx.TimeoutException:
            return "lost", f"silence for {ANSWER_S:g} s"
        except httpx.TransportError as error:
            return "unreachable", repr(error)
        return _judge(answer.status_code, answer.content, body["max_tokens"])

    async def _stream(self, client: httpx.AsyncClient, body: dict[str, Any]) -> tuple[Kind, str]:
        body = body | {"stream": True, "stream_options": {"include_usage": True}}
        begun = False
        try:
            async with client.stream("POST", f"{self._url}/v1/completions", json=body) as answer:
                if answer.status_code != 200:
                    return _judge(answer.status_code, await answer.aread(), body["max_tokens"])
                used = 0
                async for event in _events(answer):
                    if event == "[DONE]":
                        return ("answered", "") if used == body["max_tokens"] else ("lost", f"{used} tokens")
                    data = json.loads(event)
                    if "error" in data:
                        return ("broken" if begun else "refused"), str(data["error"].get("code"))
                    begun = True
                    used = (data.get("usage") or {}).get("completion_tokens", used)
        except httpx.TimeoutException:
            return "lost", f"silence for {ANSWER_S:g} s"
        except httpx.TransportError as error:
            return ("broken" if begun else "unreachable"), repr(error)
        return ("broken" if begun else "lost"), "the stream ended without [DONE]"


def _judge(status: int, content: bytes, tokens: int) -> tuple[Kind, str]:
    try:
        data = json.loads(content)
        if status == 200:
            used = data["usage"]["completion_tokens"]
            return ("answered", "") if used == tokens else ("lost", f"{used} tokens of {tokens}")
        error = data["error"]
        return ("refused" if error["code"] and error["message"] else "lost"), f"{status} {error['code']}"
    except (ValueError, LookupError, TypeError):
        return "lost", f"{status} {content[:200]!r}"


async def _events(answer: httpx.Response) -> AsyncIterator[str]:
    async for line in answer.aiter_lines():
        if line.startswith("data: "):
            yield line.removeprefix("data: ")
