"""An engine's adapters: which are loaded, which go, one load for all, and whether they answer as before."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from pathlib import Path

import pytest

from llmrun_runtime.engines.base import TokenLogprobs
from llmrun_runtime.engines.shim import adapter_slots as room
from llmrun_runtime.engines.shim.adapter_slots import AdapterError, AdapterSlots
from llmrun_runtime.engines.shim.canary import Canary


class Fake:
    """A loader that says what was done; adapters called `bad…` fail."""

    def __init__(self) -> None:
        self.inside: list[str] = []
        self.most = 0
        self.loads: list[str] = []
        self.used: list[str] = []
        self.answers: list[TokenLogprobs] = []

    async def load(self, name: str, folder: Path) -> str:
        """Takes a moment."""
        self.loads.append(name)
        await asyncio.sleep(random.uniform(0, 0.005))
        if name.startswith("bad"):
            raise AdapterError("damaged", 400)
        self.inside.append(name)
        self.most = max(self.most, len(self.inside))
        return name

    async def unload(self, adapter: str) -> None:
        """Never one in use."""
        assert adapter not in self.used
        await asyncio.sleep(random.uniform(0, 0.002))
        self.inside.remove(adapter)

    async def probe(self, adapter: str) -> list[TokenLogprobs]:
        """Whatever the test wants."""
        return self.answers

    @contextlib.contextmanager
    def using(self, adapter: str) -> Iterator[None]:
        """Count it as in use."""
        assert adapter in self.inside
        self.used.append(adapter)
        try:
            yield
        finally:
            self.used.remove(adapter)


async def bring(name: str, pin: str) -> Path:
    """At once."""
    if name == "badly-brought":
        raise AdapterError("the store is away", 503)
    return Path(pin)


async def test_the_least_recently_used_goes_and_one_in_use_stays() -> None:
    fake = Fake()
    adapters = AdapterSlots(fake, 2, bring)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    for name in ("a", "b", "a", "c"):
        await use(name)
    assert adapters.loaded() == ["a", "c"] and fake.loads == ["a", "b", "c"]
    async with adapters.using("a", "a"):
        await use("d")
        assert sorted(adapters.loaded()) == ["a", "d"]
        async with adapters.using("d", "d"):
            waiting = asyncio.create_task(use("e"))
            await asyncio.sleep(0.05)
            assert not waiting.done() and sorted(adapters.loaded()) == ["a", "d"]
        await asyncio.wait_for(waiting, 1)
    assert sorted(adapters.loaded()) == ["a", "e"]


async def test_a_store_that_hangs_costs_those_that_are_loaded_nothing() -> None:
    away = asyncio.Event()

    async def slow(name: str, pin: str) -> Path:
        if name.startswith("cold"):
            await away.wait()
        return Path(pin)

    fake = Fake()
    adapters = AdapterSlots(fake, 2, slow)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    await use("a")
    await use("b")
    cold = [asyncio.create_task(use(f"cold{number}")) for number in range(6)]
    for _ in range(20):
        await asyncio.wait_for(use("a"), 0.5)
        await asyncio.wait_for(use("b"), 0.5)
    assert fake.loads == ["a", "b"] and sorted(adapters.loaded()) == ["a", "b"]
    away.set()
    await asyncio.wait_for(asyncio.gather(*cold), 5)
    assert fake.most == 2


async def test_adapters_that_are_always_in_use_keep_none_out_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "PATIENCE_S", 0.1)
    monkeypatch.setattr(room, "WAIT_S", 1.0)
    fake, ended = Fake(), asyncio.Event()
    adapters = AdapterSlots(fake, 2, bring)

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
    assert "c" in fake.loads
    ended.set()
    await asyncio.wait_for(asyncio.gather(*callers), 5)
    async with adapters.using("a", "a"), adapters.using("b", "b"):
        with pytest.raises(AdapterError, match=r"all 2 places .* in use after 1 s \(max_loaded\)") as full:
            await use("c" if "c" not in adapters.loaded() else "d", 0)
    assert full.value.status == 503
    await use("a", 0)
    assert not fake.used and fake.most == 2


async def test_one_load_for_all_who_ask_and_none_is_spoilt_by_one_who_leaves() -> None:
    fake = Fake()
    adapters = AdapterSlots(fake, 2, bring)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            await asyncio.sleep(0)

    tasks = [asyncio.create_task(use("a")) for _ in range(10)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    await asyncio.gather(*tasks[1:])
    assert fake.loads == ["a"]
    for name, status in (("bad", 400), ("badly-brought", 503)):
        with pytest.raises(AdapterError) as failed:
            await use(name)
        assert failed.value.status == status
    assert adapters.loaded() == ["a"]
    await asyncio.gather(use("b"), use("a"))
    assert sorted(adapters.loaded()) == ["a", "b"]


async def test_a_canary_keeps_no_first_answers_that_are_no_numbers_and_mends_what_is_damaged(tmp_path: Path) -> None:
    canary, good = Canary(tmp_path), [{"1": -1.0}]
    with pytest.raises(AdapterError, match="no numbers") as failed:
        await canary.check("a", "pin", [{"1": float("nan")}])
    assert failed.value.status == 503 and not list(tmp_path.iterdir())
    (tmp_path / "pin.json").write_text("{")
    await canary.check("a", "pin", good)
    with pytest.raises(AdapterError, match="otherwise"):
        await canary.check("a", "pin", [{"1": -3.0}])
    (tmp_path / "other.json").mkdir()
    with pytest.raises(AdapterError, match="cannot be read or kept"):
        await canary.check("a", "other", good)


async def test_an_adapter_that_answers_otherwise_than_at_its_first_load_is_not_used(tmp_path: Path) -> None:
    fake = Fake()
    adapters = AdapterSlots(fake, 1, bring, Canary(tmp_path / "canary").check)

    async def use(name: str, *answers: float) -> None:
        fake.answers = [{"1": answer, "2": -9.0} for answer in answers]
        async with adapters.using(name, name):
            pass

    await use("a", -1.0, -2.0)
    await use("b", -5.0, -7.0)
    for answers, said in (((-1.0, -4.0), "0.5 apart"), ((-1.0,), "inf apart"), ((-1.0, float("nan")), "inf apart")):
        with pytest.raises(AdapterError, match=f"otherwise than .*{said}") as failed:
            await use("a", *answers)
        assert failed.value.status == 503 and fake.inside == []
    await use("a", -1.05, -1.95)
    assert fake.inside == ["a"]


async def test_different_adapters_are_brought_side_by_side() -> None:
    both = asyncio.Barrier(2)

    async def meet(name: str, pin: str) -> Path:
        await both.wait()  # until the other one is being brought, too
        return Path(pin)

    adapters = AdapterSlots(Fake(), 2, meet)

    async def use(name: str) -> None:
        async with adapters.using(name, name):
            pass

    async with asyncio.timeout(5):
        await asyncio.gather(use("a"), use("b"))
    assert sorted(adapters.loaded()) == ["a", "b"]


async def test_whatever_comes_and_goes_there_are_never_too_many_nor_one_used_that_is_gone() -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    fake = Fake()
    adapters = AdapterSlots(fake, 3, bring)

    async def caller() -> None:
        for _ in range(40):
            name = dice.choice(["a", "b", "c", "d", "e", "f", "bad", "badly-brought"])
            with contextlib.suppress(AdapterError, TimeoutError):
                async with asyncio.timeout(dice.choice([0.001, 0.01, 5])), adapters.using(name, name):
                    await asyncio.sleep(dice.uniform(0, 0.003))

    async with asyncio.timeout(60):
        await asyncio.gather(*(caller() for _ in range(20)))
        while adapters._tasks:
            await asyncio.sleep(0.01)
    assert fake.most <= 3 and not fake.used and sorted(fake.inside) == sorted(adapters.loaded())
