"""The ingress's queue, without HTTP."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from llmrun.wire import Priority
from llmrun_runtime.control.state.registry import Registry
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.ingress.queue.claim import Caller, Claim, WaitLimit
from llmrun_runtime.ingress.queue.request_queue import RequestQueue
from llmrun_runtime.wire.reports import BETWEEN_REQUESTS_S, PRIORITIES, Traffic
from llmrun_runtime.wire.routing_table import ModelRoute, ReplicaRoute, Table, by_names
from tests.support.ingress import route

COLD = route(state="waking", max_queued=3)
OTHER = route(2, name="other", names=("other",))


def table(*models: ModelRoute) -> Table:
    """Return a routing table of these models."""
    by_name = {model.name: model for model in models}
    return Table("e", 1, by_name, by_names(by_name))


class Callers:
    """Requests for `one` that wait; `served` lists those that got a claim, in order."""

    def __init__(self) -> None:
        self.queue = RequestQueue(60, lambda: None)
        self.queue.update(table(COLD))
        self.served: list[str] = []
        self.tasks: dict[str, asyncio.Task[Claim]] = {}

    async def ask(self, name: str, priority: Priority = "normal", key: str = "", model: str = "one") -> None:
        """Send a request, and return when it waits."""
        now = asyncio.get_running_loop().time()
        caller = Caller(key, priority=PRIORITIES.index(priority))

        async def claim() -> Claim:
            claim = await self.queue.claim(model, WaitLimit(now, now + 60), caller=caller)
            self.served.append(name)
            return claim

        self.tasks[name] = asyncio.create_task(claim())
        await asyncio.sleep(0)

    async def error(self, name: str) -> HTTPError:
        """Return the error of a request that must have failed."""
        with pytest.raises(HTTPError) as error:
            await asyncio.wait_for(asyncio.shield(self.tasks[name]), 1)
        return error.value

    async def serve_all(self) -> None:
        """Give the model one slot, and release it until nobody waits."""
        self.queue.update(table(route(1, max_ongoing=1, max_queued=3)))
        for _ in range(len(self.tasks)):
            waiting = [task for task in self.tasks.values() if not task.done()]
            if not waiting:
                return
            done, _ = await asyncio.wait(waiting, timeout=1, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                self.queue.release(task.result())


@pytest.fixture
async def callers() -> AsyncIterator[Callers]:
    callers = Callers()
    yield callers
    for task in callers.tasks.values():
        task.cancel()
    await asyncio.gather(*callers.tasks.values(), return_exceptions=True)
    assert not callers.queue.traffic().get("one", Traffic()).waiting


async def test_the_highest_priority_is_served_first(callers: Callers) -> None:
    await callers.ask("batch", "batch")
    await callers.ask("normal", key="a")
    await callers.ask("high", "high", key="a")
    assert PRIORITIES[callers.queue.traffic()["one"].priority] == "high"
    await callers.serve_all()
    assert callers.served == ["high", "normal", "batch"]


async def test_reported_priority_is_that_of_the_waiting_requests(callers: Callers) -> None:
    await callers.ask("batch", "batch")
    assert PRIORITIES[callers.queue.traffic()["one"].priority] == "batch"


async def test_a_full_queue_gives_a_place_of_the_lowest_priority_to_a_higher_one(callers: Callers) -> None:
    await callers.ask("first", "batch")
    await callers.ask("usual", "normal")
    await callers.ask("last", "batch", key="a")
    await callers.ask("urgent", "high")
    error = await callers.error("last")
    assert (error.status, error.code) == (429, "queue_full")
    await callers.ask("late", "batch")
    assert (await callers.error("late")).code == "queue_full"
    await callers.ask("other", "normal")
    assert (await callers.error("first")).code == "queue_full"
    await callers.ask("another", "normal")
    assert (await callers.error("another")).code == "queue_full"
    assert callers.queue.traffic()["one"].waiting == 3
    await callers.serve_all()
    assert callers.served == ["urgent", "usual", "other"]


async def test_a_request_that_is_cancelled_as_it_is_served_keeps_no_slot(callers: Callers) -> None:
    await callers.ask("gone")
    await callers.ask("next")
    callers.queue.update(table(route(1, max_ongoing=1)))
    callers.tasks["gone"].cancel()
    await asyncio.wait_for(callers.tasks["next"], 1)
    assert callers.queue.in_flight.by_model["one"] == 1


async def test_a_new_table_wakes_only_waiters_that_it_concerns(
    callers: Callers, monkeypatch: pytest.MonkeyPatch
) -> None:
    served: list[str] = []
    serve = callers.queue._serve

    def counted(model: str) -> None:
        served.append(model)
        serve(model)

    await callers.ask("waiting")
    monkeypatch.setattr(callers.queue, "_serve", counted)
    callers.queue.update(table(COLD, OTHER))
    await asyncio.sleep(0.01)
    assert served == []
    callers.queue.update(table(replace(COLD, phase="loading weights"), OTHER))
    await asyncio.sleep(0.01)
    assert served == ["one"]  # by the update, not by the waiter


async def test_waiters_fail_with_a_start_that_failed_after_they_came(callers: Callers) -> None:
    callers.queue.update(table(replace(COLD, failures=2)))
    await callers.ask("first")
    callers.queue.update(table(replace(COLD, version=2)))  # a new version: none of its starts failed
    await asyncio.sleep(0)
    assert not callers.tasks["first"].done()
    callers.queue.update(table(replace(COLD, version=2, failures=1, cause="no memory")))
    error = await callers.error("first")
    assert error.code == "model_failed" and "no memory" in error.cause


async def test_waiters_follow_their_name_to_another_model(callers: Callers) -> None:
    await callers.ask("moved", model="org/one")
    callers.queue.update(table(replace(COLD, names=("one",)), replace(OTHER, names=("other", "org/one"))))
    assert (await asyncio.wait_for(callers.tasks["moved"], 1)).model == "other"


def test_control_sees_the_highest_priority_in_flight() -> None:
    queue = RequestQueue(60, lambda: None)
    claims = [Claim("one", ReplicaRoute("r", "h", 1, "t"), Caller(priority=priority)) for priority in (0, 2)]
    for claim in claims:
        queue.in_flight.add(claim, 1)
    assert queue.traffic()["one"].in_flight_priority == 2 and not queue.traffic()["one"].recent
    queue.release(claims[1])
    assert queue.traffic()["one"].in_flight_priority == 2, "the caller's next request comes in a moment"
    time.sleep(BETWEEN_REQUESTS_S)
    assert queue.traffic()["one"].in_flight_priority == 0


def test_a_model_between_two_requests_is_not_idle() -> None:
    """Requests may be shorter than the time between two reports."""
    queue = RequestQueue(60, lambda: None)
    batch = Claim("one", ReplicaRoute("r", "h", 1, "t"), Caller(priority=0))
    queue.in_flight.add(batch, 1)
    queue.release(batch)
    assert queue.traffic() == {"one": Traffic(in_flight_priority=0, recent=True)}
    registry = Registry()
    registry.report_traffic("ingress", queue.traffic(), 10)
    assert registry.quiet_since("one", 1, 10) == 0 and registry.priority("one") == 0
    assert not registry.load("one", 1)
    time.sleep(BETWEEN_REQUESTS_S)
    assert queue.traffic() == {}
