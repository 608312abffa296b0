"""`llmrun adapter push`: takes an adapter in, copies it to where a model's adapters lie, and lists it there."""

from __future__ import annotations

import asyncio
import shutil
import tarfile
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from weakref import WeakValueDictionary

import ray

from llmrun.errors import EngineError, Refused, WeightsError
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES, read_rank
from llmrun.weights import Weights
from llmrun.wire import MAX_ADAPTER_BYTES
from llmrun_runtime.control.autoscaling.autoscaler import Autoscaler
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.weights import ERRAND_TIMEOUT_S
from llmrun_runtime.control.state.models import Deployed
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.node.agent import agent_on

FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)


class AdapterPushes:
    """`folder`: where adapters lie between the command line and their store; what an earlier life left is removed."""

    def __init__(self, folder: Path, scaling: Autoscaler, adapters: AdaptersCatalog, jobs: Operations) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._scaling = scaling
        self._adapters = adapters
        self._jobs = jobs
        self._writing: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()

    async def start(self, model: str, name: str, tar: AsyncIterator[bytes]) -> Operation:
        """Take in the files, as a tar, and begin. Raises Refused for what can be known to fail."""
        row = self._scaling.deployed.get(model)
        target = _target(model, row, name)
        assert row
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            here = Path(tempfile.mkdtemp(dir=self._folder))
        except OSError as error:
            raise Refused(f"the head cannot take files in ({error})", 507) from None
        try:
            await _receive(tar, here)
            _check(here, row, name)
        except BaseException as error:
            shutil.rmtree(here, ignore_errors=True)
            if isinstance(error, OSError):
                raise Refused(f"the head could not take the files in ({error})", 507) from None
            raise
        return self._jobs.start("adapter push", lambda job: self._run(row, name, target, here, job))

    async def _run(self, row: Deployed, name: str, target: Weights, here: Path, job: Operation) -> None:
        try:
            size = sum(file.stat().st_size for file in here.iterdir())
            await job.say("step", text=f"copying {size:,} bytes to {target}")
            agent = agent_on(ray.get_runtime_context().get_node_id())
            try:
                async with self._writing.setdefault(str(target), asyncio.Lock()):  # files of two must not mix
                    await asyncio.wait_for(agent.push.remote(str(here), target, row.spec.env), ERRAND_TIMEOUT_S)
            except ray.exceptions.RayTaskError as error:
                cause = error.cause
                raise (cause if isinstance(cause, WeightsError | EngineError) else error) from None
            except (ray.exceptions.RayError, TimeoutError) as error:
                raise EngineError(f"the head's node agent went away ({type(error).__name__}): push again") from None
            await job.say("step", text=f"listing the adapters of {row.name}")
            if not await self._adapters.look(row.name):
                raise WeightsError(f"it was copied to {target}, which could not be listed: it is tried again later")
            if not self._adapters.has(row.name, name):
                raise WeightsError(
                    f"it was copied to {target}, and is not listed there: `llmrun adapter list` says more"
                )
            await job.say("done", text=f"{row.name}:{name} is {target} now")
        finally:
            await asyncio.to_thread(shutil.rmtree, here, ignore_errors=True)


def _target(model: str, row: Deployed | None, name: str) -> Weights:
    """Where the adapter goes. Raises Refused."""
    if not row or not (lora := row.spec.lora):
        raise Refused(f"{model} has no adapters: lora= of its @llm says where they lie", 409)
    if not ADAPTER_NAME.fullmatch(name):
        raise Refused(f"{name!r}: an adapter's name has letters, digits, '.', '_' and '-'", 422)
    if lora.path is None and name not in lora.adapters:
        raise Refused(f"{model} names the place of each adapter, and none for {name!r}: write it in lora= first", 409)
    source = lora.path or lora.adapters[name]
    if source.kind == "hub":
        raise Refused(f"{source} is a repository of the Hub: `hf upload {source.repo} DIR` puts files there", 409)
    if source.anonymous:
        raise Refused(f"{source} is read without credentials: nothing can be written there", 409)
    if lora.path is None:
        return source
    below = f"{source.source.rstrip('/')}/{name}"
    return Weights(below, endpoint_url=source.endpoint_url)


async def _receive(tar: AsyncIterator[bytes], here: Path) -> None:
    """Put the two files into the folder. Raises Refused, OSError."""
    whole, size = here / "adapter.tar", 0
    with whole.open("wb") as file:
        async for chunk in tar:
            size += len(chunk)
            if size > MAX_ADAPTER_BYTES:
                raise Refused(f"the adapter is larger than {MAX_ADAPTER_BYTES >> 30} GiB", 413)
            await asyncio.to_thread(file.write, chunk)
    await asyncio.to_thread(_unpack, whole, here)
    whole.unlink()


def _unpack(whole: Path, here: Path) -> None:
    try:
        with tarfile.open(whole, "r:") as tar:
            for name in FILES:
                taken = tar.extractfile(name)
                if taken is None:
                    raise KeyError(name)
                with taken, (here / name).open("wb") as file:
                    shutil.copyfileobj(taken, file)
    except (tarfile.TarError, KeyError) as error:
        raise Refused(f"the adapter arrived damaged ({error}): push it again", 400) from None


def _check(here: Path, row: Deployed, name: str) -> None:
    """Raises Refused for one that the model's engines could not take."""
    try:
        if (size := (here / ADAPTER_CONFIG).stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes")
        rank = read_rank((here / ADAPTER_CONFIG).read_bytes())
    except ValueError as error:
        raise Refused(f"{name}: its {ADAPTER_CONFIG} cannot be read ({error})", 422) from None
    most = row.spec.lora.max_rank if row.spec.lora else None
    if most and rank > most:
        text = f"{name}: its rank is {rank}, and {row.name} was deployed for {most} at most: lora=LoRA(…, max_rank=)"
        raise Refused(text, 422)
