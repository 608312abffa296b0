"""Adapters at a source, with the ranks that their configurations say: each is read once, for what is new."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from llmrun.errors import WeightsError
from llmrun.lora import ADAPTER_CONFIG, MAX_CONFIG_BYTES, read_rank
from llmrun_runtime.weights.adapters import Adapter, find_adapters
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.stores.base import Store
from llmrun_runtime.weights.stores.ranges import TransferError

# What is not read by then is read at the next listing: a deploy need not wait for thousands of small files.
READ_S = 20
AT_ONCE = 16


def list_adapters(store: Store, known: Mapping[str, int] | None) -> list[Adapter]:
    """All adapters there, in the order of their names. Raises WeightsError.

    `known`: ranks by the configurations' ids, the others are read; None: nobody wants to know them.
    """
    listed = store.listed()
    store.use(listed)
    files = {file.name: file for file in listed.files}
    found = [adapter for _, adapter in sorted(find_adapters(listed).items())]
    if known is None:
        return found
    ranks = dict(known)
    pool = ThreadPoolExecutor(AT_ONCE)
    reading = {
        pool.submit(_read, store, files[_config_of(adapter, files)]): adapter.config_id
        for adapter in found
        if not ranks.get(adapter.config_id)
    }
    done, _ = wait(reading, READ_S)
    pool.shutdown(wait=False, cancel_futures=True)
    ranks |= {reading[task]: task.result() for task in done}
    return [adapter.model_copy(update={"rank": ranks.get(adapter.config_id, 0)}) for adapter in found]


def _config_of(adapter: Adapter, files: Mapping[str, File]) -> str:
    """What the listing calls its configuration: a source that is one adapter has it at the top."""
    name = f"{adapter.folder or adapter.name}/{ADAPTER_CONFIG}"
    return name if name in files else ADAPTER_CONFIG


def _read(store: Store, config: File) -> int:
    """The rank; 0 if it cannot be read: whoever asks for that adapter hears why."""
    try:
        if config.size > MAX_CONFIG_BYTES:
            return 0
        place = store.local(config)
        return read_rank(place.read_bytes() if place else b"".join(store.reader.read(config, 0, config.size)))
    except (TransferError, WeightsError, OSError, ValueError):
        return 0
