"""List the adapters at a source with their LoRA ranks; each configuration is read once per version."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, wait

from llmrun.errors import WeightsError
from llmrun.lora import ADAPTER_CONFIG, MAX_CONFIG_BYTES, read_lora_rank
from llmrun_runtime.weights.adapters import Adapter, find_adapters, find_skipped
from llmrun_runtime.weights.pin import File
from llmrun_runtime.weights.stores.base import Store
from llmrun_runtime.weights.stores.ranges import TransferError

# The next listing reads the rest, so that a deploy never waits for thousands of small files.
READ_TIMEOUT_S = 20
CONCURRENT_READS = 16


def list_adapters(store: Store, known_ranks: Mapping[str, int] | None) -> tuple[list[Adapter], dict[str, str]]:
    """Return all adapters at the source, sorted by name, and what was left out (`find_skipped`). Raises WeightsError.

    `known_ranks`: ranks by configuration id; other configurations are read. None reads no ranks at all.
    """
    listing = store.list_files()
    store.use_pin(listing)
    files = {file.name: file for file in listing.files}
    adapters = [adapter for _, adapter in sorted(find_adapters(listing).items())]
    if known_ranks is None:
        return adapters, find_skipped(listing)
    ranks = dict(known_ranks)
    pool = ThreadPoolExecutor(CONCURRENT_READS)
    reads = {
        pool.submit(_read_rank, store, files[_config_name(adapter, files)]): adapter.config_id
        for adapter in adapters
        if not ranks.get(adapter.config_id)
    }
    done, _ = wait(reads, READ_TIMEOUT_S)
    pool.shutdown(wait=False, cancel_futures=True)
    ranks |= {reads[read]: read.result() for read in done}
    ranked = [adapter.model_copy(update={"rank": ranks.get(adapter.config_id, 0)}) for adapter in adapters]
    return ranked, find_skipped(listing)


def _config_name(adapter: Adapter, files: Mapping[str, File]) -> str:
    """The configuration's name in the listing: at the top if the source itself is the adapter."""
    name = f"{adapter.folder or adapter.name}/{ADAPTER_CONFIG}"
    return name if name in files else ADAPTER_CONFIG


def _read_rank(store: Store, config: File) -> int:
    """Return the LoRA rank; 0 if it cannot be read: a request for that adapter then reports the reason."""
    try:
        if config.size > MAX_CONFIG_BYTES:
            return 0
        path = store.local_copy(config)
        return read_lora_rank(path.read_bytes() if path else b"".join(store.reader.read(config, 0, config.size)))
    except (TransferError, WeightsError, OSError, ValueError):
        return 0
