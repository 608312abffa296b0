"""Runs the user's hooks beside the engine: one instance, each call in its own time, never in the way of another.

A plain hook runs in a thread of its own. Async ones share an event loop, where what `on_start` opened lives on; one
that blocks it delays the others under way there, and those that have not begun move on to a new loop.
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

from llmrun.app_file import load_file
from llmrun.errors import HookError
from llmrun_runtime.engines.base import ShimConfig

PROBE_S = 1.0  # a loop that does not answer for so long is blocked


@dataclass
class Call:
    """One call of a hook in another thread: its end, its result or what it raised, and where it runs."""

    done: asyncio.Event
    loop: asyncio.AbstractEventLoop
    began: bool = False
    late: bool = False
    result: Any = None
    error: BaseException | None = None
    thread: int = 0

    def finish(self, result: Any = None, error: BaseException | None = None) -> None:
        """End it, from whichever thread."""
        self.result, self.error = result, error
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.done.set)


@dataclass
class Loop:
    """An event loop in a thread of its own."""

    loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.new_event_loop)

    def __post_init__(self) -> None:
        threading.Thread(target=self.loop.run_forever, name="llmrun-hooks", daemon=True).start()

    async def answers(self) -> bool:
        """Whether it turns within PROBE_S."""
        pong = Call(asyncio.Event(), asyncio.get_running_loop())
        self.loop.call_soon_threadsafe(pong.finish)
        return await _within(PROBE_S, pong.done)


class Hooks:
    """One instance of the user's class and the threads that its hooks run in."""

    def __init__(self, config: ShimConfig) -> None:
        self._config = config
        self._file = Path(config.file)
        self._instance: Any = None
        self._loop: Loop | None = None

    async def start(self) -> None:
        """Import the class, make its one instance and run `on_start`. Raises HookError."""
        cls = self._config.cls
        module = await self._call(f"importing {self._file.name}", load_file, self._file, timeout=None)
        found: Any = module
        for part in cls.split("."):
            found = getattr(found, part)
        self._instance = await self._call(f"{cls}()", found, timeout=None)
        if "on_start" in self._config.hooks:
            # No deadline of its own: it may load what it needs; start_timeout bounds the whole.
            await self._call(f"{cls}.on_start", self._instance.on_start, timeout=None)

    async def apply(self, request: dict[str, Any]) -> bytes:
        """The request's body as `on_request` gives it back, as JSON. Raises HookError, for this request alone."""
        if "on_request" not in self._config.hooks:
            return json.dumps(request).encode()
        name = f"{self._config.cls}.on_request"
        answer = await self._call(name, self._instance.on_request, request, timeout=self._config.hook_timeout)
        if not isinstance(answer, dict):
            raise _logged(f"{name} returned {type(answer).__name__}: it must return the request, a dict")
        try:
            return json.dumps(answer).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise _logged(f"{name} returned a request that is no JSON: {error}") from None

    async def _call(self, name: str, hook: Callable[..., Any], *args: Any, timeout: float | None) -> Any:
        run = self._run_async if inspect.iscoroutinefunction(hook) else self._run_plain
        call = await run(hook, args, timeout)
        if call.late:
            raise _logged(f"{name} did not answer within {timeout:g} s", self._stack(call.thread))
        if call.error is not None:
            tb = self._users_part(call.error.__traceback__)
            text = "".join(traceback.format_exception(type(call.error), call.error, tb))
            raise _logged(f"{name} raised {traceback.format_exception_only(call.error)[-1].strip()}", text)
        return call.result

    async def _run_plain(self, hook: Callable[..., Any], args: tuple[Any, ...], timeout: float | None) -> Call:
        call = Call(asyncio.Event(), asyncio.get_running_loop())

        def run() -> None:
            call.thread = threading.get_ident()
            try:
                call.finish(hook(*args))
            except BaseException as error:  # noqa: BLE001 - SystemExit too is the request's, not the engine's
                call.finish(error=error)

        threading.Thread(target=run, name="llmrun-hook", daemon=True).start()
        call.late = not await _within(timeout, call.done)
        return call

    async def _run_async(self, hook: Callable[..., Any], args: tuple[Any, ...], timeout: float | None) -> Call:
        """Run it on the hooks' loop; as long as it has not begun, on a new one if that loop turns out blocked."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while True:
            home = self._loop = self._loop or Loop()
            call = Call(asyncio.Event(), asyncio.get_running_loop())

            async def run(call: Call = call) -> None:
                call.began, call.thread = True, threading.get_ident()
                try:
                    call.finish(await hook(*args))
                except BaseException as error:  # noqa: BLE001 - as above
                    call.finish(error=error)

            started = asyncio.run_coroutine_threadsafe(run(), home.loop)
            while not await _within(_left(deadline, PROBE_S), call.done):
                over = deadline is not None and time.monotonic() >= deadline
                if not call.began and not await home.answers() and not call.began:
                    started.cancel()
                    if self._loop is home:
                        self._loop = None
                    break  # another request's hook holds the loop
                if over:
                    call.late = True
                    started.cancel()
                    if self._loop is home and not await home.answers():
                        self._loop = None
                    return call
            else:
                return call

    def _users_part(self, tb: TracebackType | None) -> TracebackType | None:
        """The traceback from the first line of the user's own code on: what is above says nothing to them."""
        own = tb
        while own and not own.tb_frame.f_code.co_filename.startswith(str(self._file.parent)):
            own = own.tb_next
        return own or tb

    def _stack(self, thread: int) -> str:
        """Where a thread is now, from the user's own code on."""
        frame = sys._current_frames().get(thread)
        lines = traceback.extract_stack(frame) if frame else []
        own = [i for i, line in enumerate(lines) if line.filename.startswith(str(self._file.parent))]
        return "".join(traceback.format_list(lines[own[0] :])) if own else ""


def _left(deadline: float | None, most: float) -> float:
    return most if deadline is None else max(0.0, min(most, deadline - time.monotonic()))


async def _within(timeout: float | None, event: asyncio.Event) -> bool:
    try:
        await asyncio.wait_for(event.wait(), timeout)
    except TimeoutError:
        return False
    return True


def _logged(text: str, detail: str = "") -> HookError:
    """A HookError whose text, with the user's traceback, stands in the engine's log."""
    print(f"[llmrun] {text}\n{detail}".rstrip(), file=sys.stderr, flush=True)
    return HookError(text)
