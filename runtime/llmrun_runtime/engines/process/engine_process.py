"""The replica's end of an engine: starts its process, holds the lease, waits until it answers, ends it.

Knows processes and sockets; nothing of Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import os
import signal
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp

from llmrun.errors import EngineError, LLMRunError
from llmrun_runtime.engines.base import Engine, Launch
from llmrun_runtime.engines.process.child import UNKNOWN_EXIT
from llmrun_runtime.engines.process.start import StartedProcess, start_process
from llmrun_runtime.wire.headers import LEAVE_PATH, STATE_PATH, TOKEN_HEADER

log = logging.getLogger("ray.serve")
POLL_S = 0.05
LISTEN_POLL_S = 0.005  # an engine that is ready listens at once
TERM_GRACE_S = 10  # vLLM ends within 1-2 s of SIGTERM
LAST_GRACE_S = 3
STATE_TIMEOUT_S = 2  # well within control's patience for a report
LOG_TAIL_BYTES = 64 * 1024
Bring = Callable[[str, str], Awaitable[Path]]
"""From an adapter's name and pin to its folder on this node. Raises LLMRunError."""


class EngineProcess:
    """One engine. `start`, `ready`, then `state` as often as wanted, then `end`.

    `begun`: if it had a head start. `bring`: where adapters come from that the engine asks for.
    """

    def __init__(
        self, engine: Engine, launch: Launch, begun: StartedProcess | None = None, bring: Bring | None = None
    ) -> None:
        self._engine = engine
        self._launch = launch
        self._begun = begun
        self._bring = bring
        self._errands: set[asyncio.Task[None]] = set()
        self.port = 0
        """Where it speaks HTTP; 0 before it says so."""
        self.link = 0
        """Where it listens for ingresses (`llmrun_runtime.link`)."""
        self._ready = asyncio.Event()
        self._failed = ""
        self._holders: set[asyncio.StreamWriter] = set()
        self._lease: asyncio.Server | None = None
        self._session: aiohttp.ClientSession | None = None
        self._over = False

    @property
    def pid(self) -> int:
        """The process's id; 0 before it is started."""
        return self._begun.child.pid if self._begun else 0

    @property
    def token(self) -> str:
        """What a request to the engine must carry; "" before it is started."""
        return self._begun.token if self._begun else ""

    @property
    def forked(self) -> bool:
        """Whether it came from a warm parent."""
        return bool(self._begun and self._begun.forked)

    @property
    def begun_at(self) -> float:
        """Unix time of when the process was there; 0 before."""
        return self._begun.at if self._begun else 0

    async def start(self) -> None:
        """Start the process, if it has not been begun. Raises EngineError if its command cannot be run at all."""
        self._begun = self._begun or await start_process(self._engine, self._launch)
        self._lease = await asyncio.start_server(self._serve_lease, sock=self._begun.lease)

    async def ready(self, timeout: float) -> None:
        """Return when the engine answers. Raises EngineError with its root cause if it ends or takes too long."""
        try:
            async with asyncio.timeout(timeout):
                while not (self._ready.is_set() and self.port and await self._answers()):
                    if self._failed or self.ended():
                        raise EngineError(self.cause())
                    await self._soon()
        except TimeoutError:
            raise EngineError(
                f"the engine did not answer within {timeout:g} s (LLMRUN_START_TIMEOUT); {self.cause()}"
            ) from None

    def ended(self) -> bool:
        """Whether the process is gone."""
        return self._begun is None or self._begun.child.poll() is not None

    def cause(self) -> str:
        """Why the engine failed, in one line, from what it said and from its log."""
        if cause := self._own_words():
            return cause
        code = self._begun.child.poll() if self._begun else None
        if code is None or code == UNKNOWN_EXIT:
            return "its log names no cause"
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            return f"the engine was ended by {signal.Signals(-code).name}{hint}; its log names no cause"
        return f"the engine ended with exit code {code}; its log names no cause"

    def unexplained(self) -> bool:
        """Whether it ended and left no word of why: something else ended it."""
        return self.ended() and not self._own_words()

    def _own_words(self) -> str:
        if self._failed:
            return self._failed
        if not self._begun:
            return ""
        with self._begun.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(self._begun.log_start, size - LOG_TAIL_BYTES))
            return self._engine.root_cause(log.read().decode(errors="replace"))

    async def state(self) -> dict[str, Any]:
        """The shim's counts. Raises EngineError if it does not answer within STATE_TIMEOUT_S."""
        return await self._asked(STATE_PATH)

    async def leave(self) -> dict[str, Any]:
        """The same; if nothing is in flight, it takes no request from now on. Raises EngineError, too."""
        return await self._asked(LEAVE_PATH)

    async def _asked(self, path: str) -> dict[str, Any]:
        try:
            async with self._http().get(self._url(path), headers={TOKEN_HEADER: self.token}) as answer:
                state: dict[str, Any] = await answer.json()
                return state
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineError(f"the engine does not answer: {type(error).__name__}") from error

    async def max_model_len(self) -> int:
        """Tokens of a prompt and its answer together, as the engine lists its model; 0 if it does not say."""
        try:
            async with self._http().get(self._url("/v1/models"), headers={TOKEN_HEADER: self.token}) as answer:
                return int((await answer.json())["data"][0]["max_model_len"])
        except (aiohttp.ClientError, TimeoutError, ValueError, LookupError, TypeError):
            return 0

    async def end(self) -> None:
        """End every process of the engine: ask, let go of the lease, then force."""
        child = self._begun.child if self._begun else None
        if child and not self.ended():
            child.send_signal(signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(TERM_GRACE_S):
                    while not self.ended():
                        await asyncio.sleep(POLL_S)
        for errand in list(self._errands):
            errand.cancel()
        if self._lease:
            self._lease.close()
        for holder in list(self._holders):
            holder.close()
        if child:
            # Its own session, so its own group: what is left of it is ours. Python's resource tracker is, for a
            # moment: it removes the shared memory of those that have ended.
            with contextlib.suppress(ProcessLookupError):
                for _ in range(int(LAST_GRACE_S / POLL_S)):
                    os.killpg(child.pid, 0)
                    await asyncio.sleep(POLL_S)
                os.killpg(child.pid, signal.SIGKILL)
            if not await asyncio.to_thread(child.wait, TERM_GRACE_S):
                log.warning("engine process %d does not end", child.pid)  # in the kernel, perhaps
        if self._session:
            await self._session.close()
        if self._begun and not self._over:
            self._over = True
            self._begun.child.close()
            self._begun.scratch.remove()

    async def _soon(self) -> None:
        """Wait a moment, or until the engine says that it is ready."""
        if self._ready.is_set():
            await asyncio.sleep(LISTEN_POLL_S)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._ready.wait(), POLL_S)

    async def _answers(self) -> bool:
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
        return f"http://{self._launch.members[0].host}:{self.port}{path}"

    async def _serve_lease(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Hold one process's connection open until it or this replica ends, and hear what it says."""
        try:
            hello = json.loads(await asyncio.wait_for(reader.readline(), 10) or b"{}")
            if not hmac.compare_digest(str(hello.get("token", "")), self.token):
                return
            self._holders.add(writer)
            while line := await reader.readline():
                message = json.loads(line)
                self.port = message.get("port", self.port)
                self.link = message.get("link", self.link)
                self._failed = message.get("failed", self._failed)
                if message.get("ready"):
                    self._ready.set()
                if "ask" in message:
                    task = asyncio.get_running_loop().create_task(self._answer(message, writer))
                    self._errands.add(task)
                    task.add_done_callback(self._errands.discard)
        except (ValueError, OSError, TimeoutError):
            return  # not one of the engine's processes, or one that ended
        finally:
            self._holders.discard(writer)
            writer.close()

    async def _answer(self, message: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        """Bring an adapter that the engine asks for."""
        said: dict[str, Any] = {"answer": message["ask"]}
        try:
            if not self._bring:
                raise EngineError("this replica brings no adapters")
            said["path"] = str(await self._bring(message["adapter"], message["pin"]))
        except LLMRunError as error:
            said["error"] = str(error)
        except Exception as error:
            log.exception("the adapter %s could not be brought", message.get("adapter"))
            said["error"] = f"{type(error).__name__}: {error}"
        writer.write(json.dumps(said).encode() + b"\n")
