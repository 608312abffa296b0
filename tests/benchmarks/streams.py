"""Load on a server: clients that send requests one after the other and read their answers, with little parsing."""

from __future__ import annotations

import asyncio
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

PROMPT = "Once upon a time"
ROUND_TIMEOUT_S = 300
EVENT = b"data: {"
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


@dataclass
class Result:
    """One round of one target; all times in seconds. Without streams, the first tokens are whole answers."""

    seconds: float = 0
    answers: int = 0
    first_tokens: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    events: int = 0
    cpu: float = 0


@dataclass(frozen=True)
class Target:
    """A server and the headers of requests to it; `cpu_s` returns the CPU-seconds that it has used so far."""

    port: int
    model: str
    headers: str = ""
    cpu_s: Callable[[], float] = lambda: 0.0


@dataclass(frozen=True)
class Load:
    """What each client sends: requests for `tokens` tokens each, to one of PATHS."""

    clients: int
    requests: int
    tokens: int = 64
    kind: str = "completions"
    stream: bool = True

    def request(self, target: Target) -> bytes:
        """Return a request as it is sent."""
        prompt = {"messages": [{"role": "user", "content": PROMPT}]} if self.kind == "chat" else {"prompt": PROMPT}
        body = {"model": target.model, **prompt, "max_tokens": self.tokens, "temperature": 0}
        data = json.dumps({**body, "ignore_eos": True, "stream": self.stream}).encode()
        head = f"POST {PATHS[self.kind]} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{target.headers}"
        return head.encode() + f"content-length: {len(data)}\r\n\r\n".encode() + data


class Connection(asyncio.Protocol):
    """One connection with one request at a time. It adds to `result` what it sees."""

    def __init__(self, result: Result) -> None:
        self._result = result
        self._head = b""
        self._left = 0
        """The bytes of an answer that are missing; -1 for one in chunks."""
        self._tail = b""
        self._last = self._started = 0.0
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def send(self, transport: asyncio.WriteTransport, request: bytes) -> None:
        """Send a request; `done` is the end of its answer."""
        self.done = asyncio.get_running_loop().create_future()
        self._head, self._tail, self._left, self._last = b"", b"", 0, 0.0
        self._started = time.perf_counter()
        transport.write(request)

    def data_received(self, data: bytes) -> None:
        """Count events; the end is the last byte, or the empty chunk."""
        now = time.perf_counter()
        if not self._left:
            self._head += data
            head, end, data = self._head.partition(b"\r\n\r\n")
            if not end:
                return
            fields = head.lower().split(b"\r\n")
            if b" 200 " not in fields[0]:
                self._fail(ConnectionError(head.decode()))
                return
            length = [line for line in fields if line.startswith(b"content-length:")]
            self._left = int(length[0].partition(b":")[2]) if length else -1
        if self._left > 0:
            self._left -= len(data)
            if not self._left:
                self._result.first_tokens.append(now - self._started)
                self._end()
            return
        data = self._tail + data
        if events := data.count(EVENT):
            if self._last:
                self._result.gaps += [now - self._last] + [0.0] * (events - 1)
            else:
                self._result.first_tokens.append(now - self._started)
            self._last = now
            self._result.events += events
        if data.endswith(b"0\r\n\r\n"):
            self._end()
        self._tail = data[-(len(EVENT) - 1) :]

    def _end(self) -> None:
        self._result.answers += 1
        if not self.done.done():
            self.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        if not self.done.done():
            self.done.set_exception(error)

    def connection_lost(self, error: Exception | None) -> None:
        """Fail if an answer has not ended."""
        self._fail(error or ConnectionError("the connection was closed"))


async def _measure(target: Target, load: Load) -> Result:
    result, request = Result(), load.request(target)

    async def client() -> None:
        loop = asyncio.get_running_loop()
        transport, connection = await loop.create_connection(lambda: Connection(result), "127.0.0.1", target.port)
        for _ in range(load.requests):
            connection.send(transport, request)
            await connection.done
        transport.close()

    cpu, started = target.cpu_s(), time.perf_counter()
    async with asyncio.timeout(ROUND_TIMEOUT_S):
        await asyncio.gather(*(client() for _ in range(load.clients)))
    result.seconds, result.cpu = time.perf_counter() - started, target.cpu_s() - cpu
    assert result.answers == load.clients * load.requests
    return result


def measure(target: Target, load: Load) -> Result:
    """Run one round. Raises ConnectionError for an answer other than 200."""
    return asyncio.run(_measure(target, load))


def percentile(values: list[float], share: float) -> float:
    """Return the value below which this share of the values is; 0 without values."""
    return sorted(values)[min(len(values) - 1, int(share * len(values)))] if values else 0.0


@dataclass(frozen=True)
class Summary:
    """Several rounds of one target: the median rate, the percentiles over all rounds, the CPU per 1,000 tokens."""

    rate: float
    first_p50: float
    first_p99: float
    gap_p50: float
    gap_p99: float
    cpu: float


def summarize(results: list[Result], load: Load) -> Summary:
    """Return the summary of a target's rounds; tokens per second, seconds, CPU-seconds."""
    first_tokens = [seconds for result in results for seconds in result.first_tokens]
    gaps = [seconds for result in results for seconds in result.gaps]
    tokens = load.tokens * sum(result.answers for result in results)
    return Summary(
        statistics.median(load.tokens * result.answers / result.seconds for result in results),
        percentile(first_tokens, 0.5),
        percentile(first_tokens, 0.99),
        percentile(gaps, 0.5),
        percentile(gaps, 0.99),
        1000 * sum(result.cpu for result in results) / tokens,
    )
