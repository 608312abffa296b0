"""The replica's side of an engine: starts its process, serves its lease, waits until it is ready, stops it.

Handles processes and sockets; does not depend on Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import aiohttp

from llmrun.errors import EngineError, LLMRunError
from llmrun_runtime.engines.base import Engine, Launch, prove_token
from llmrun_runtime.engines.process.child import UNKNOWN_EXIT
from llmrun_runtime.engines.process.start import StartedProcess, start_process
from llmrun_runtime.http import http_url
from llmrun_runtime.wire.headers import LEAVE_PATH, PROBE_PREFIX, SINCE, STATE_PATH, TOKEN_HEADER

log = logging.getLogger("ray.serve")
POLL_S = 0.05
LISTEN_POLL_S = 0.005  # an engine that reported ready listens within milliseconds
TERM_GRACE_S = 10  # vLLM exits within 1-2 s of SIGTERM
GROUP_GRACE_S = 3
STATE_TIMEOUT_S = 2  # well below control's limit for missing reports
LOG_TAIL_BYTES = 64 * 1024
MESSAGE_BYTES = 1024 * 1024
FetchAdapter = Callable[[str, str], Awaitable[Path]]
"""Returns the folder of an adapter on this node, given its name and pin. Raises LLMRunError."""


class ForkFailed(EngineError):
    """A forked engine failed because it was forked; as a plain process it may start."""


class EngineProcess:
    """One engine: `start`, `ready`, then `state` any number of times, then `end`.

    `started`: its process, if it was prestarted. `fetch_adapter`: fetches the adapters that the engine requests.
    """

    def __init__(
        self,
        engine: Engine,
        launch: Launch,
        started: StartedProcess | None = None,
        fetch_adapter: FetchAdapter | None = None,
    ) -> None:
        self._engine = engine
        self._launch = launch
        self._started = started
        self._fetch_adapter = fetch_adapter
        self._tasks: set[asyncio.Task[None]] = set()
        self.port = 0
        """Its HTTP port; 0 until the engine has reported it."""
        self.link = 0
        """The port on which it listens for ingresses (`llmrun_runtime.link`)."""
        self._ready = asyncio.Event()
        self._reported_failure = ""
        self._lease_connections: set[asyncio.StreamWriter] = set()
        self._lease: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None
        self._closed = False

    @property
    def pid(self) -> int:
        """The process id; 0 before the start."""
        return self._started.child.pid if self._started else 0

    @property
    def token(self) -> str:
        """The secret that requests to the engine must carry; "" before the start."""
        return self._started.token if self._started else ""

    @property
    def forked(self) -> bool:
        """Whether the fork server forked it."""
        return bool(self._started and self._started.forked)

    @property
    def cores(self) -> tuple[int, ...]:
        """The CPUs that it computes on; () if llmrun did not choose them."""
        return self._started.cores if self._started else ()

    @property
    def started_at(self) -> float:
        """The Unix time at which its process was started; 0 before."""
        return self._started.started_at if self._started else 0

    async def start(self) -> None:
        """Start the process, unless it was prestarted. Raises EngineError if its command cannot be run."""
        self._started = self._started or await start_process(self._engine, self._launch)
        self._lease = await asyncio.start_server(self._serve_lease, sock=self._started.lease, limit=MESSAGE_BYTES)

    async def ready(self, timeout: float) -> None:
        """Return when the engine answers.

        Raises EngineError with its root cause if it exits or exceeds `timeout` seconds; ForkFailed if that cause is
        the fork.
        """
        try:
            async with asyncio.timeout(timeout):
                while not (self._ready.is_set() and self.port and await self._is_responding()):
                    if self._reported_failure or self.ended():
                        raise self._error("")
                    await self._wait_briefly()
        except TimeoutError:
            raise self._error(f"the engine did not answer within {timeout:g} s (LLMRUN_START_TIMEOUT); ") from None

    def _error(self, prefix: str) -> EngineError:
        cause = self.cause()
        # CUDA and other libraries name the fork when it is what they do not support.
        kind = ForkFailed if self.forked and "fork" in cause else EngineError
        return kind(f"{prefix}{cause}")

    def ended(self) -> bool:
        """Return whether the process has exited."""
        return self._started is None or self._started.child.poll() is not None

    def cause(self) -> str:
        """Return why the engine failed, in one line: what it reported, its log, or its exit code."""
        if cause := self._logged_cause():
            return cause
        code = self._started.child.poll() if self._started else None
        if code is None or code == UNKNOWN_EXIT:
            return "no cause found in its log"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the engine was killed by {signal.Signals(-code).name}{hint}; no cause found in its log"
        return f"the engine exited with code {code}; no cause found in its log"

    def unexplained(self) -> bool:
        """Return whether it exited without a reported or logged cause: something else ended it."""
        return self.ended() and not self._logged_cause()

    def _logged_cause(self) -> str:
        if self._reported_failure:
            return self._reported_failure
        if not self._started:
            return ""
        try:
            with self._started.log.open("rb") as log:
                size = log.seek(0, os.SEEK_END)
                start = self._started.log_start if self._started.log_start <= size else 0  # 0: it has been trimmed
                log.seek(max(start, size - LOG_TAIL_BYTES))
                return self._engine.root_cause(log.read().decode(errors="replace"))
        except FileNotFoundError:
            return ""

    async def state(self, since: int = 0) -> dict[str, Any]:
        """Return the shim's counts; of usage and paces, those that changed after the response with number `since`.

        Raises EngineError if the engine does not answer within STATE_TIMEOUT_S.
        """
        return await self._get_state(STATE_PATH, since)

    async def leave(self, since: int = 0) -> dict[str, Any]:
        """The same as `state`; if no request is in flight, the engine also refuses new requests from now on."""
        return await self._get_state(LEAVE_PATH, since)

    async def _get_state(self, path: str, since: int) -> dict[str, Any]:
        try:
            async with self._http().get(
                self._url(f"{path}?{SINCE}={since}"), headers={TOKEN_HEADER: self.token}
            ) as answer:
                state: dict[str, Any] = await answer.json()
                return state
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"the engine does not answer: {type(error).__name__}") from error

    async def probe(self, path: str, body: Mapping[str, Any] | None, timeout: float) -> int:
        """Send the engine a request (POST, or GET without a body) past hooks and counts.

        Return the status of its answer; 0 if it did not answer within `timeout` seconds. Raises EngineError if the
        connection fails.
        """
        method = "GET" if body is None else "POST"
        limit = aiohttp.ClientTimeout(total=timeout)
        url, headers = self._url(PROBE_PREFIX + path), {TOKEN_HEADER: self.token}
        try:
            async with self._http().request(method, url, json=body, headers=headers, timeout=limit) as answer:
                await answer.read()
                return answer.status
        except TimeoutError:
            return 0
        except aiohttp.ClientError as error:
            raise EngineError(f"the engine does not answer: {type(error).__name__}") from error

    async def max_model_len(self) -> int:
        """Return the engine's limit for the tokens of a prompt and its completion; 0 if it does not report one."""
        try:
            async with self._http().get(self._url("/v1/models"), headers={TOKEN_HEADER: self.token}) as answer:
                return int((await answer.json())["data"][0]["max_model_len"])
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
            return 0

    async def end(self) -> None:
        """Stop every process of the engine: SIGTERM, then the end of the lease, then SIGKILL."""
        child = self._started.child if self._started else None
        if child and not self.ended():
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERM_GRACE_S):
                    while not self.ended():
                        await asyncio.sleep(POLL_S)
        for task in list(self._tasks):
            task.cancel()
        if self._lease:
            self._lease.close()
        for connection in list(self._lease_connections):
            connection.close()
        if child:
            # The engine leads its own process group, so every process left in it belongs to the engine. Python's
            # resource tracker outlives it for a moment: it removes the shared memory of processes that have exited.
            with contextlib.suppress(ProcessLookupError):
                for _ in range(int(GROUP_GRACE_S / POLL_S)):
                    os.killpg(child.pid, 0)
                    await asyncio.sleep(POLL_S)
                os.killpg(child.pid, signal.SIGKILL)
            if not await asyncio.to_thread(child.wait, TERM_GRACE_S):
                log.warning("engine process %d does not exit", child.pid)  # blocked in the kernel, perhaps
        if self._session:
            await self._session.close()
        if self._started and not self._closed:
            self._closed = True
            self._started.child.close()
            self._started.temp_dir.remove()

    async def _wait_briefly(self) -> None:
        """Wait for POLL_S, or until the engine reports that it is ready."""
        if self._ready.is_set():
            await asyncio.sleep(LISTEN_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), POLL_S)

    async def _is_responding(self) -> bool:
        try:
            await self.state()
        except EngineError:
            return False
        return True

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=STATE_TIMEOUT_S))
        return self._session

    def _url(self, path: str) -> str:
        return http_url(self._launch.members[0].host, self.port) + path

    async def _serve_lease(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Keep one process's connection open until it or this replica ends, and handle its messages."""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10) or b"{}")
            proof = prove_token(self.token, int(hello["pid"]))
            if not hmac.compare_digest(str(hello["proof"]).encode(), proof.encode()):
                return
            self._lease_connections.add(writer)
            while line := await reader.readline():
                message = json.loads(line)
                self.port = message.get("port", self.port)
                self.link = message.get("link", self.link)
                self._reported_failure = message.get("failed", self._reported_failure)
                if message.get("ready"):
                    self._ready.set()
                if "ask" in message:
                    task = asyncio.get_running_loop().create_task(self._send_adapter(message, writer))
                    self._tasks.add(task)
                    task.add_done_callback(self._tasks.discard)
        except (ValueError, LookupError, TypeError, OSError, TimeoutError):
            return  # not a process of this engine, or one that exited
        finally:
            self._lease_connections.discard(writer)
            writer.close()

    async def _send_adapter(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Fetch an adapter that the engine requests, and reply with its folder."""
        reply: dict[str, Any] = {"answer": message["ask"]}
        try:
            if not self._fetch_adapter:
                raise EngineError("this replica cannot fetch adapters")
            reply["path"] = str(await self._fetch_adapter(message["adapter"], message["pin"]))
        except LLMRunError as error:
            reply["error"] = str(error)
        except Exception as error:
            log.exception("failed to fetch the adapter %s", message.get("adapter"))
            reply["error"] = f"{type(error).__name__}: {error}"
        writer.write(json.dumps(reply).encode() + b"\n")
