"""Streams behind a proxy, to old clients, and when the engine dies: nobody may take a part for the whole."""

from __future__ import annotations

import contextlib
import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import anthropic
import httpx
import openai
import psutil
import pytest

from tests.support.cluster import Home, free_port, until
from tests.support.nginx import nginx

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
CHAT, MESSAGES, RESPONSES = "/v1/chat/completions", "/v1/messages", "/v1/responses"
HI: list[Any] = [{"role": "user", "content": "Hi"}]
GREEDY: dict[str, Any] = {"temperature": 0}
STORY: list[Any] = [{"role": "user", "content": "Write a long story about a ship."}]
LONG: dict[str, Any] = {"model": "talker", "stream": True, "ignore_eos": True, "temperature": 0}


def first_token(url: str) -> float:
    """Return the seconds until the first token of a stream that lasts seconds."""
    body = LONG | {"messages": HI, "max_tokens": 150}
    began = time.monotonic()
    with httpx.stream("POST", url + CHAT, json=body, timeout=60) as answer:
        assert answer.status_code == 200
        assert answer.headers["cache-control"] == "no-cache"
        for line in answer.iter_lines():
            if '"content":' in line and line.startswith("data: "):
                return time.monotonic() - began
    raise AssertionError("no token")


def test_nginx_as_it_comes_passes_on_the_first_token(served: Home, tmp_path: Path) -> None:
    """nginx buffers answers, and asks by HTTP/1.0, unless it is told otherwise."""
    port = free_port()
    site = f"server {{ listen 127.0.0.1:{port}; location / {{ proxy_pass http://127.0.0.1:{served.port}; }} }}\n"
    with nginx(tmp_path, site):
        first_token(served.url)
        times = [(first_token(served.url), first_token(f"http://127.0.0.1:{port}")) for _ in range(3)]
    direct, behind = (median(column) for column in zip(*times, strict=True))
    assert behind < direct + 1, times


def test_a_client_of_http_1_0_gets_a_plain_stream(served: Home) -> None:
    body = json.dumps({"model": "talker", "messages": HI, "max_tokens": 8, "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", served.port), timeout=60) as sock:
        head = f"POST {CHAT} HTTP/1.0\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        sock.sendall(head.encode() + body)
        answer = b"".join(iter(lambda: sock.recv(65536), b""))
    headers, _, content = answer.partition(b"\r\n\r\n")
    assert headers.startswith(b"HTTP/1.1 200") and b"chunked" not in headers.lower()
    events = content.decode().strip().split("\n\n")
    assert all(event.startswith("data: ") for event in events) and events[-1] == "data: [DONE]"


def test_a_closed_stream_frees_its_place_at_once(served: Home) -> None:
    """How it is measured: 100 times, a stream is closed after its first event, then a request is sent at once."""
    key = served.ok("key", "create", "one-at-a-time", "--max-in-flight", "1").split()[0]
    headers, statuses = {"authorization": f"Bearer {key}"}, list[int]()
    try:
        with httpx.Client(base_url=served.url, headers=headers, timeout=60) as client:
            for _ in range(100):
                body = LONG | {"messages": HI, "max_tokens": 500}
                with client.stream("POST", CHAT, json=body) as answer:
                    next(answer.iter_lines())
                statuses.append(answer.status_code)
                quick = {"model": "talker", "messages": HI, "max_tokens": 1}
                statuses.append(client.post(CHAT, json=quick).status_code)
    finally:
        served.ok("key", "revoke", "one-at-a-time")
    assert set(statuses) == {200}, statuses


def engine_of(served: Home, kind: str) -> psutil.Process:
    """Return the process of talker's API server, or of its engine core, once it answers."""
    until(lambda: served.ask("talker").status_code == 200, 90, "talker answers: it pauses after an engine has died")
    (server,) = served.engines("talker")
    # A server that is not forked has a process of multiprocessing's, too.
    return server if kind == "api" else max(server.children(recursive=True), key=lambda each: each.memory_info().rss)


def from_openai(url: str) -> Iterator[Any]:
    with openai.OpenAI(base_url=url + "/v1", api_key="none", max_retries=0) as client:
        yield from client.chat.completions.create(
            model="talker", messages=STORY, max_tokens=1500, temperature=0, stream=True
        )


def from_anthropic(url: str) -> Iterator[Any]:
    with anthropic.Anthropic(base_url=url, api_key="none", max_retries=0) as client:
        yield from client.messages.create(
            model="talker", messages=STORY, max_tokens=1500, stream=True, extra_body=GREEDY
        )


@pytest.mark.parametrize(
    ("kind", "events", "error"),
    [
        ("core", from_openai, openai.APIError),
        ("core", from_anthropic, anthropic.APIStatusError),
        ("api", from_anthropic, anthropic.APIStatusError),
    ],
)
def test_a_client_raises_when_the_engine_dies(
    served: Home, kind: str, events: Callable[[str], Iterator[Any]], error: type[Exception]
) -> None:
    process = engine_of(served, kind)
    with pytest.raises(error, match="stream interrupted"):
        for count, _ in enumerate(events(served.url)):
            if count == 20:
                process.kill()


def test_a_response_fails_when_the_engine_dies(served: Home) -> None:
    """Codex waits for the last event."""
    process = engine_of(served, "core")
    last: dict[str, Any] = {}
    with httpx.stream("POST", served.url + RESPONSES, json=LONG | {"input": "Hi"}, timeout=60) as answer:
        names: list[str] = []
        for line in answer.iter_lines():
            if line.startswith("event: "):
                names.append(line.removeprefix("event: "))
            elif line.startswith("data: "):
                assert line != "data: [DONE]"
                last = json.loads(line.removeprefix("data: "))
            if len(names) == 20:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
    assert names[-1] == last["type"] == "response.failed"
    assert last["response"]["id"].startswith("resp_") and last["response"]["status"] == "failed"
    assert last["response"]["error"]["code"] == "stream_broken_off"
