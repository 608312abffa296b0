"""`llmrun adapter push`: receives an adapter, copies it to a model's adapter source, and lists it there."""

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
from llmrun.lora import ADAPTER_CONFIG, ADAPTER_NAME, ADAPTER_WEIGHTS, MAX_CONFIG_BYTES, read_lora_rank
from llmrun.weights import Weights
from llmrun.wire import MAX_ADAPTER_BYTES
from llmrun_runtime.control.catalog.adapters import AdaptersCatalog
from llmrun_runtime.control.catalog.distribution import TASK_TIMEOUT_S
from llmrun_runtime.control.state.models import Deployed, Models
from llmrun_runtime.control.state.operation import Operation, Operations
from llmrun_runtime.node.agent import agent_on

FILES = (ADAPTER_WEIGHTS, ADAPTER_CONFIG)


class AdapterPushes:
    """Adapters on their way from the CLI to a model's source.

    `folder` holds the received files. What an earlier process left in it is removed.
    """

    def __init__(self, folder: Path, models: Models, adapters: AdaptersCatalog, operations: Operations) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self._folder = folder
        self._models = models
        self._adapters = adapters
        self._operations = operations
        self._write_locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """By target: two pushes must not mix their files."""

    async def start(self, model: str, name: str, tar: AsyncIterator[bytes]) -> Operation:
        """Receive the files as a tar, check them and start to copy them. Raises Refused if that is certain to fail."""
        row = self._models.deployed.get(model)
        if not row or not row.spec.lora:
            raise Refused(f"{model} has no adapters: set lora= in its @llm", 409)
        target = _target(row, name)
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            folder = Path(tempfile.mkdtemp(dir=self._folder))
        except OSError as error:
            raise Refused(f"the head node cannot store the adapter ({error})", 507) from None
        try:
            await _receive(tar, folder)
            _check(folder, row, name)
        except BaseException as error:
            shutil.rmtree(folder, ignore_errors=True)
            if isinstance(error, OSError):
                raise Refused(f"the head node cannot store the adapter ({error})", 507) from None
            raise
        return self._operations.start(
            "adapter push", lambda operation: self._copy_and_list(row, name, target, folder, operation)
        )

    async def _copy_and_list(
        self, row: Deployed, name: str, target: Weights, folder: Path, operation: Operation
    ) -> None:
        try:
            size = sum(file.stat().st_size for file in folder.iterdir())
            await operation.emit("step", text=f"copying {size:,} bytes to {target}")
            await self._copy(row, target, folder)
            await operation.emit("step", text=f"listing the adapters of {row.name}")
            if not await self._adapters.refresh(row.name):
                raise WeightsError(f"copied to {target}, but listing it failed: control retries later")
            if not self._adapters.has(row.name, name):
                raise WeightsError(f"copied to {target}, but not listed there: see `llmrun adapter list {row.name}`")
            await operation.emit("done", text=f"pushed {row.name}:{name} to {target}")
        finally:
            await asyncio.to_thread(shutil.rmtree, folder, ignore_errors=True)

    async def _copy(self, row: Deployed, target: Weights, folder: Path) -> None:
        """Have the head's node agent copy the folder to the target. Raises WeightsError, EngineError."""
        agent = agent_on(ray.get_runtime_context().get_node_id())
        try:
            async with self._write_locks.setdefault(str(target), asyncio.Lock()):
                await asyncio.wait_for(agent.push_adapter.remote(str(folder), target, row.spec.env), TASK_TIMEOUT_S)
        except ray.exceptions.RayTaskError as error:
            cause = error.cause
            raise (cause if isinstance(cause, WeightsError | EngineError) else error) from None
        except (ray.exceptions.RayError, TimeoutError) as error:
            text = f"lost the connection to the head's node agent ({type(error).__name__}). Push again"
            raise EngineError(text) from None


def _target(row: Deployed, name: str) -> Weights:
    """Return where the adapter is copied to. Raises Refused."""
    lora = row.spec.lora
    assert lora
    if not ADAPTER_NAME.fullmatch(name):
        raise Refused(f"{name!r}: an adapter's name may contain only letters, digits, '.', '_' and '-'", 422)
    if lora.path is None and name not in lora.adapters:
        raise Refused(f"lora= of {row.name} has no entry {name!r}. Add it and deploy first", 409)
    source = lora.path or lora.adapters[name]
    if source.kind == "hub":
        raise Refused(f"cannot push to {source}, a Hugging Face repository: use `hf upload {source.repo} DIR`", 409)
    if source.anonymous:
        raise Refused(f"cannot push to {source}: it is read without credentials (anonymous=True)", 409)
    if lora.path is None:
        return source
    return Weights(f"{source.source.rstrip('/')}/{name}", endpoint_url=source.endpoint_url)


async def _receive(tar: AsyncIterator[bytes], folder: Path) -> None:
    """Receive a tar and unpack its two files into the folder. Raises Refused, OSError."""
    archive, size = folder / "adapter.tar", 0
    with archive.open("wb") as file:
        async for chunk in tar:
            size += len(chunk)
            if size > MAX_ADAPTER_BYTES:
                raise Refused(f"the adapter is larger than {MAX_ADAPTER_BYTES >> 30} GiB", 413)
            await asyncio.to_thread(file.write, chunk)
    await asyncio.to_thread(_unpack, archive, folder)
    archive.unlink()


def _unpack(archive: Path, folder: Path) -> None:
    try:
        with tarfile.open(archive, "r:") as tar:
            for name in FILES:
                info = tar.getmember(name)
                member = tar.extractfile(info)
                if member is None or info.issparse():  # which may unpack to any size
                    raise KeyError(name)
                with member, (folder / name).open("wb") as file:
                    shutil.copyfileobj(member, file)
    except (tarfile.TarError, KeyError) as error:
        raise Refused(f"the adapter arrived damaged ({error}). Push again", 400) from None


def _check(folder: Path, row: Deployed, name: str) -> None:
    """Raise Refused for an adapter that the model's engines cannot load."""
    try:
        if (size := (folder / ADAPTER_CONFIG).stat().st_size) > MAX_CONFIG_BYTES:
            raise ValueError(f"it has {size:,} bytes, the limit is {MAX_CONFIG_BYTES:,}")
        rank = read_lora_rank((folder / ADAPTER_CONFIG).read_bytes())
    except ValueError as error:
        raise Refused(f"cannot read {ADAPTER_CONFIG} of {name} ({error})", 422) from None
    max_rank = row.spec.lora.max_rank if row.spec.lora else None
    if max_rank and rank > max_rank:
        text = f"{name} has rank {rank}, but {row.name} allows {max_rank} at most: set lora=LoRA(…, max_rank=)"
        raise Refused(text, 422)
