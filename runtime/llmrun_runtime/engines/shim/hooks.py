"""Runs the user's hooks next to the engine: one instance, concurrent calls, a timeout for each call.

A plain hook runs in its own thread. Async hooks share an event loop, where objects that `on_start` opened stay usable.
A hook that blocks the loop delays the hooks that already run there; hooks that have not started move to a new loop.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from llmrun.app_file import LoadedFile, load_file
from llmrun.context import RequestContext
from llmrun.decorator import takes_context
from llmrun.errors import HookError
from llmrun_runtime.engines.base import ShimConfig

PROBE_TIMEOUT_S = 1.0  # a loop that does not respond within this time is blocked


@dataclass
class Call:
    """One call of a hook in another thread: its state, its result or exception, and its thread."""

    done: asyncio.Event
    loop: asyncio.AbstractEventLoop
    started: bool = False
    timed_out: bool = False
    result: Any = None
    error: BaseException | None = None
    thread: int = 0

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """Complete the call, from any thread."""
        self.result, self.error = result, error
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.done.set)


@dataclass
class LoopThread:
    """An event loop in its own thread."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __post_init__(self) -> None:
        threading.Thread(target=self.loop.run_forever, name="llmrun-hooks", daemon=True).start()

    async def is_responsive(self, timeout: float) -> bool:
        """Return whether the loop runs a callback within `timeout` seconds."""
        pong = Call(asyncio.Event(), asyncio.get_running_loop())
        self.loop.call_soon_threadsafe(pong.finish)
        return await _within(timeout, pong.done)


class Hooks:
    """One instance of the user's class, and the threads that run its hooks."""

    def __init__(self, config: ShimConfig, *, probe_timeout: float = PROBE_TIMEOUT_S) -> None:
        self._config = config
        self._probe_timeout = probe_timeout
        self._file = Path(config.file)
        self._instance: Any = None
        self._loop: LoopThread | None = None

    async def start(self) -> None:
        """Import the class, create its instance and run `on_start`. Raises HookError."""
        cls = self._config.cls
        loaded: LoadedFile = await self._call(f"importing {self._file.name}", load_file, self._file, timeout=None)
        user_class = loaded.find(self._config.model, cls)
        self._instance = await self._call(f"{cls}()", user_class, timeout=None)
        if "on_start" in self._config.hooks:
            # No separate timeout: start_timeout bounds the whole start.
            await self._call(f"{cls}.on_start", self._instance.on_start, timeout=None)

    async def apply(self, request: dict[str, Any], context: RequestContext) -> dict[str, Any]:
        """Return the request body from `on_request`. Raises HookError, which fails this request only."""
        if "on_request" not in self._config.hooks:
            return request
        name = f"{self._config.cls}.on_request"
        hook = self._instance.on_request
        arguments = (request, context) if takes_context(inspect.signature(hook)) else (request,)
        body = await self._call(name, hook, *arguments, timeout=self._config.hook_timeout)
        if not isinstance(body, dict):
            raise _logged(f"{name} returned {type(body).__name__}: it must return the request, a dict")
        return body

    async def apply_to_json(self, request: dict[str, Any], context: RequestContext) -> bytes:
        """Return the request body from `on_request`, as JSON. Raises HookError, see `apply`."""
        body = await self.apply(request, context)
        try:
            return json.dumps(body).encode()
        except (TypeError, ValueError, RecursionError) as error:
            name = f"{self._config.cls}.on_request"
            raise _logged(f"{name} returned a request that is not JSON-serializable: {error}") from None

    async def _call(self, name: str, hook: Callable[..., Any], *args: Any, timeout: float | None) -> Any:
        run = self._run_async if inspect.iscoroutinefunction(hook) else self._run_plain
        call = await run(hook, args, timeout)
        if call.timed_out:
            raise _logged(f"{name} timed out after {timeout:g} s", self._stack(call.thread))
        if call.error is not None:
            tb = self._user_frames(call.error.__traceback__)
            text = "".join(traceback.format_exception(type(call.error), call.error, tb))
            raise _logged(f"{name} raised {traceback.format_exception_only(call.error)[-1].strip()}", text)
        return call.result

    async def _run_plain(self, hook: Callable[..., Any], args: tuple[Any, ...], timeout: float | None) -> Call:
        call = Call(asyncio.Event(), asyncio.get_running_loop())

        def run() -> None:
            call.thread = threading.get_ident()
            try:
                call.finish(hook(*args))
            except BaseException as error:  # noqa: BLE001 - SystemExit too fails the request, not the engine
                call.finish(error=error)

        threading.Thread(target=run, name="llmrun-hook", daemon=True).start()
        call.timed_out = not await _within(timeout, call.done)
        return call

    async def _run_async(self, hook: Callable[..., Any], args: tuple[Any, ...], timeout: float | None) -> Call:
        """Run it on the hooks' loop; on a new loop if that one is blocked before the call has started."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            hook_loop = self._loop = self._loop or LoopThread()
            call = Call(asyncio.Event(), asyncio.get_running_loop())

            async def run(call: Call = call) -> None:
                call.started, call.thread = True, threading.get_ident()
                try:
                    call.finish(await hook(*args))
                except BaseException as error:  # noqa: BLE001 - as above
                    call.finish(error=error)

            future = asyncio.run_coroutine_threadsafe(run(), hook_loop.loop)
            while not await _within(_remaining(deadline, self._probe_timeout), call.done):
                expired = deadline is not None and time.monotonic() >= deadline
                if not call.started and not await hook_loop.is_responsive(self._probe_timeout) and not call.started:
                    future.cancel()
                    if self._loop is hook_loop:
                        self._loop = None
                    break  # another request's hook blocks the loop
                if expired:
                    call.timed_out = True
                    future.cancel()
                    if self._loop is hook_loop and not await hook_loop.is_responsive(self._probe_timeout):
                        self._loop = None
                    return call
            else:
                return call

    def _user_frames(self, tb: TracebackType | None) -> TracebackType | None:
        """Return the traceback from the first frame of the user's code on, without llmrun's frames above it."""
        user_tb = tb
        while user_tb and not user_tb.tb_frame.f_code.co_filename.startswith(str(self._file.parent)):
            user_tb = user_tb.tb_next
        return user_tb or tb

    def _stack(self, thread: int) -> str:
        """Return a thread's current stack, from the user's code on."""
        frame = sys._current_frames().get(thread)
        lines = traceback.extract_stack(frame) if frame else []
        first = [i for i, line in enumerate(lines) if line.filename.startswith(str(self._file.parent))]
        return "".join(traceback.format_list(lines[first[0] :])) if first else ""


def _remaining(deadline: float | None, limit: float) -> float:
    return limit if deadline is None else max(0.0, min(limit, deadline - time.monotonic()))


async def _within(timeout: float | None, event: asyncio.Event) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except TimeoutError:
        return False
    return True


def _logged(text: str, detail: str = "") -> HookError:
    """Return a HookError; write its text and the user's traceback to the engine's log."""
    print(f"[llmrun] {text}\n{detail}".rstrip(), file=sys.stderr, flush=True)
    return HookError(text)
