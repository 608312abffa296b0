"""Adapter slots: loading, eviction, shared loads, and the canary."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun_runtime.engines.base import TokenLogprobs
from llmrun_runtime.engines.shim import adapter_slots
from llmrun_runtime.engines.shim.adapter_slots import AdapterError, AdapterSlots
from llmrun_runtime.engines.shim.canary import Canary


class FakeLoader:
    """A loader that records its calls; adapters named `bad…` fail."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.peak = 0
        self.loads: list[str] = []
        self.used: list[str] = []
        self.answers: list[TokenLogprobs] = []

    async def load(self, name: str, folder: Path) -> str:
        """Load after a short random delay."""
        self.loads.append(name)
        await asyncio.sleep(random.uniform(0, 0.005))
        if name.startswith("bad"):
            raise AdapterError("damaged", 400)
        self.loaded.append(name)
        self.peak = max(self.peak, len(self.loaded))
        return name

    async def unload(self, adapter: str) -> None:
        """Fail if the adapter is in use."""
        assert adapter not in self.used
        await asyncio.sleep(random.uniform(0, 0.002))
        self.loaded.remove(adapter)

    async def probe(self, adapter: str) -> list[TokenLogprobs]:
        """Return the test's answers."""
        return self.answers

    @contextlib.contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Record the adapter as in use."""
        assert adapter in self.loaded
        self.used.append(adapter)
        try:
            yield
        finally:
            self.used.remove(adapter)


async def fetch(name: str, pin: str) -> Path:
    """Return immediately."""
    if name == "fetch-fails":
        raise AdapterError("the object store is not reachable", 503)
    return Path(pin)


async def test_the_least_recently_used_adapter_is_unloaded_unless_it_is_in_use() -> None:
    loader = FakeLoader()
    adapters = AdapterSlots(loader, 2, fetch)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    for name in ("a", "b", "a", "c"):
        await use(name)
    assert adapters.loaded() == ["a", "c"] and loader.loads == ["a", "b", "c"]
    async with adapters.using("a", "a"):
        await use("d")
        assert sorted(adapters.loaded()) == ["a", "d"]
        async with adapters.using("d", "d"):
            waiting = asyncio.create_task(use("e"))
            await asyncio.sleep(0.05)
            assert not waiting.done() and sorted(adapters.loaded()) == ["a", "d"]
        await asyncio.wait_for(waiting, 1)
    assert sorted(adapters.loaded()) == ["a", "e"]


async def test_an_unresponsive_store_does_not_affect_loaded_adapters() -> None:
    reachable = asyncio.Event()

    async def slow(name: str, pin: str) -> Path:
        if name.startswith("cold"):
            await reachable.wait()
        return Path(pin)

    loader = FakeLoader()
    adapters = AdapterSlots(loader, 2, slow)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    await use("a")
    await use("b")
    cold = [asyncio.create_task(use(f"cold{number}")) for number in range(6)]
    for _ in range(20):
        await asyncio.wait_for(use("a"), 0.5)
        await asyncio.wait_for(use("b"), 0.5)
    assert loader.loads == ["a", "b"] and sorted(adapters.loaded()) == ["a", "b"]
    reachable.set()
    await asyncio.wait_for(asyncio.gather(*cold), 5)
    assert loader.peak == 2


async def test_adapters_in_constant_use_do_not_block_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adapter_slots, "YIELD_AFTER_S", 0.1)
    monkeypatch.setattr(adapter_slots, "SLOT_TIMEOUT_S", 1.0)
    loader, ended = FakeLoader(), asyncio.Event()
    adapters = AdapterSlots(loader, 2, fetch)

    async def use(name: str, seconds: float) -> None:
        async with adapters.using(name, name):
            await asyncio.sleep(seconds)

    async def always(name: str) -> None:
        while not ended.is_set():
            async with asyncio.TaskGroup() as overlapping:
                overlapping.create_task(use(name, 0.05))
                await asyncio.sleep(0.02)
                overlapping.create_task(use(name, 0.05))

    callers = [asyncio.create_task(always(name)) for name in ("a", "b") for _ in range(3)]
    await asyncio.sleep(0.05)
    await asyncio.wait_for(use("c", 0), 0.9)
    assert "c" in loader.loads
    ended.set()
    await asyncio.wait_for(asyncio.gather(*callers), 5)
    async with adapters.using("a", "a"), adapters.using("b", "b"):
        with pytest.raises(
            AdapterError, match=r"timed out after 1 s: all 2 adapter slots are in use \(max_loaded\)"
        ) as full:
            await use("c" if "c" not in adapters.loaded() else "d", 0)
    assert full.value.status == 503
    await use("a", 0)
    assert not loader.used and loader.peak == 2


async def test_concurrent_requests_share_one_load() -> None:
    loader = FakeLoader()
    adapters = AdapterSlots(loader, 2, fetch)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(use("a")) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(*tasks[1:])
    assert loader.loads == ["a"]
    for name, status in (("bad", 400), ("fetch-fails", 503)):
        with pytest.raises(AdapterError) as failed:
            await use(name)
        assert failed.value.status == status
    assert adapters.loaded() == ["a"]
    await asyncio.gather(use("b"), use("a"))
    assert sorted(adapters.loaded()) == ["a", "b"]


async def test_a_canary_replaces_a_damaged_reference_but_stores_no_invalid_one(tmp_path: Path) -> None:
    canary, good = Canary(tmp_path), [{"1": -1.0}]
    with pytest.raises(AdapterError, match="not numbers") as failed:
        await canary.check("a", "pin", [{"1": float("nan")}])
    assert failed.value.status == 503 and not list(tmp_path.iterdir())
    (tmp_path / "pin.json").write_text("{")
    await canary.check("a", "pin", good)
    with pytest.raises(AdapterError, match="answers differ"):
        await canary.check("a", "pin", [{"1": -3.0}])
    (tmp_path / "other.json").mkdir()
    with pytest.raises(AdapterError, match="cannot read or store"):
        await canary.check("a", "other", good)


async def test_an_adapter_whose_answers_differ_from_its_first_load_is_not_used(tmp_path: Path) -> None:
    loader = FakeLoader()
    adapters = AdapterSlots(loader, 1, fetch, Canary(tmp_path / "canary").check)

    async def use(name: str, *answers: float) -> None:
        loader.answers = [{"1": answer, "2": -9.0} for answer in answers]
        async with adapters.using(name, name):
            pass

    await use("a", -1.0, -2.0)
    await use("b", -5.0, -7.0)
    for answers, distance in (((-1.0, -4.0), "0.5"), ((-1.0,), "inf"), ((-1.0, float("nan")), "inf")):
        with pytest.raises(AdapterError, match=f"differ from the first load .*: mean distance {distance} ") as failed:
            await use("a", *answers)
        assert failed.value.status == 503 and loader.loaded == []
    await use("a", -1.05, -1.95)
    assert loader.loaded == ["a"]


async def test_different_adapters_are_fetched_concurrently() -> None:
    both = asyncio.Barrier(2)

    async def meet(name: str, pin: str) -> Path:
        await both.wait()  # until the other one is being fetched too
        return Path(pin)

    adapters = AdapterSlots(FakeLoader(), 2, meet)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    async with asyncio.timeout(5):
        await asyncio.gather(use("a"), use("b"))
    assert sorted(adapters.loaded()) == ["a", "b"]


async def test_random_load_never_exceeds_the_slots() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    loader = FakeLoader()
    adapters = AdapterSlots(loader, 3, fetch)

    async def caller() -> None:
        for _ in range(40):
            name = dice.choice(["a", "b", "c", "d", "e", "f", "bad", "fetch-fails"])
            with contextlib.suppress(AdapterError, TimeoutError):
                async with asyncio.timeout(dice.choice([0.001, 0.01, 5])), adapters.using(name, name):
                    await asyncio.sleep(dice.uniform(0, 0.003))

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller() for _ in range(20)))
        while adapters._tasks:
            await asyncio.sleep(0.01)
    assert loader.peak <= 3 and not loader.used and sorted(loader.loaded) == sorted(adapters.loaded())
