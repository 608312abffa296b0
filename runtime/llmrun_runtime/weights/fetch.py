"""Fetch a pin into this node's cache: from local files first, then from other nodes, then from the store."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import PurePosixPath
from urllib.parse import quote

import urllib3
from pydantic import BaseModel

from llmrun.errors import WeightsError
from llmrun.lora import ADAPTER_WEIGHTS
from llmrun_runtime.safetensors_files import read_shapes
from llmrun_runtime.weights.cache.cache import Cache, Manifest, ManifestEntry
from llmrun_runtime.weights.cache.digests import blob_names, hash_file, mismatch
from llmrun_runtime.weights.cache.local_files import LocalFiles
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.base import Store, open_store
from llmrun_runtime.weights.stores.ranges import HttpReader, Reader
from llmrun_runtime.weights.transfer import (
    CONNECTIONS,
    DEFAULT_RETRIES,
    PART_BYTES,
    DiskFullError,
    FileDownload,
    RetryPolicy,
    Transfer,
)

PEER_TIMEOUT_S = 10
# Another process may evict files while the last ones arrive: then the fetch starts again.
ROUNDS = 3
INDEXES = (".safetensors.index.json", ".bin.index.json")
Progress = Callable[[int, int], None]
"""Called with `(bytes complete, bytes in total)` from any thread."""


class Peer(BaseModel):
    """Another node that serves its weights."""

    url: str
    token: str


class PeerLocator:
    """Locates a pin's files on a peer. See ranges.Locator."""

    def __init__(self, peer: Peer, pin: Pin) -> None:
        self._pin_id = pin.id
        self.name = f"node {urllib3.util.parse_url(peer.url).host}"
        self._base = f"{peer.url}/{quote(pin.id)}"
        self._headers = {"Authorization": f"Bearer {peer.token}"}

    def locate(self, file: File, *, refresh: bool) -> tuple[str, dict[str, str]]:
        """See Locator."""
        return f"{self._base}/{quote(file.name)}", self._headers

    def explain(self, file: File, status: int) -> str:
        """See Locator."""
        return f"{self.name} does not serve {file.name} (HTTP status {status})"

    def manifest(self) -> Manifest | None:
        """Return the peer's manifest of the pin; None if the peer does not respond with one."""
        try:
            response = urllib3.request("GET", self._base, headers=self._headers, timeout=PEER_TIMEOUT_S, retries=False)
            manifest = Manifest.model_validate_json(response.data) if response.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError):
            return None
        return manifest if manifest and manifest.pin.id == self._pin_id else None


class Fetcher:
    """Fetches one pin. `keep`: pins that must not be evicted for it."""

    def __init__(
        self,
        cache: Cache,
        pin: Pin,
        keep: Collection[str] = (),
        peers: Sequence[Peer] = (),
        progress: Progress = lambda complete, total: None,
        retries: RetryPolicy = DEFAULT_RETRIES,
    ) -> None:
        self._cache = cache
        self._pin = pin
        self._keep = {*keep, pin.id}
        self._peers = peers
        self._progress = progress
        self._retries = retries
        self._complete_bytes = 0
        self._lock = threading.Lock()
        self._store: Store | None = None

    def run(self) -> Manifest:
        """Return the manifest of the complete pin. Raises WeightsError."""
        pin, cache = self._pin, self._cache
        cache.remove_stale_small_files()
        with locked(cache.lock_path(pin.id)):
            for _ in range(ROUNDS):
                manifest = cache.find(pin.id) or cache.publish(pin, self._collect())
                if manifest:
                    cache.touch(pin.id)
                    return manifest
        raise WeightsError(
            f"{pin.weights}: another process keeps removing its files from {cache.root}: find it, and try again"
        )

    def _collect(self) -> dict[str, ManifestEntry]:
        """Find or download all files of the pin."""
        self._complete_bytes = 0
        entries: dict[str, ManifestEntry] = {}
        missing = []
        local_files = LocalFiles(self._cache)
        for file in self._pin.files:
            entry = local_files.find(file) or self._find_in_hub_cache(file)
            if entry:
                entries[file.name] = entry
                self._add_bytes(file.size)
            else:
                missing.append(file)
        # Indexes first, so that a source with missing shards fails before the download.
        indexes = [file for file in missing if file.name.endswith(INDEXES)]
        for files in (indexes, [file for file in missing if file not in indexes]):
            if files:
                entries |= self._download(files, {entry.place for entry in entries.values()})
            self._check_shards(entries)
        self._check_sizes(entries)
        return entries

    def _find_in_hub_cache(self, file: File) -> ManifestEntry | None:
        """Return a file of the Hub's cache on this node, if its digest is correct."""
        if self._pin.imported or self._pin.weights.kind != "hub":
            return None
        path = self._open_store().local_copy(file)
        if path is None or not path.is_file() or path.stat().st_size != file.size:
            return None
        digests = hash_file(path, file.digests)
        return None if mismatch(digests, file.digests) else self._cache.reference(path, file, digests)

    def _open_store(self) -> Store:
        if self._store is None:
            self._store = open_store(self._pin.weights, CONNECTIONS)
            self._store.use_pin(self._pin)
        return self._store

    def _readers(self) -> tuple[list[Reader], dict[str, dict[str, str]]]:
        """Return the readers that have the files, nearest first, and the peers' digests by file name."""
        readers: list[Reader] = []
        digests: dict[str, dict[str, str]] = {}
        for peer in self._peers:
            locator = PeerLocator(peer, self._pin)
            manifest = locator.manifest()
            if manifest:
                readers.append(HttpReader(locator, CONNECTIONS, proxies={}, is_store=False))
                # The first peer's digests, since its bytes arrive first.
                digests = {name: entry.digests for name, entry in manifest.entries.items()} | digests
        if not self._pin.imported:
            readers.append(self._open_store().reader)
        if not readers:
            raise WeightsError(f"{self._pin.weights} was imported, and no reachable node has it: import it again")
        return readers, digests

    def _download(self, missing: list[File], in_use: Collection[str]) -> dict[str, ManifestEntry]:
        """Download files. A large file that another process downloads, or has just downloaded, is reused.

        `in_use`: blobs of the pin that the cache has already.
        """
        readers, peer_digests = self._readers()
        entries: dict[str, ManifestEntry] = {}
        rechecked: set[str] = set()
        while missing:
            elsewhere: list[File] = []  # downloaded by another process
            with contextlib.ExitStack() as locks:
                downloads = []
                for file in missing:
                    data = self._cache.partial / self._partial_name(file)
                    if file.size > PART_BYTES and not locks.enter_context(locked(data.with_suffix(".lock"), 0)):
                        elsewhere.append(file)
                        continue
                    if file.size > PART_BYTES and file.name not in rechecked and self._has_blob(file):
                        rechecked.add(file.name)  # another process finished after this one looked
                        elsewhere.append(file)
                        continue
                    theirs = peer_digests.get(file.name, {})
                    # Other nodes say themselves that theirs differs: the pin's "md5" of an encrypted object is none.
                    differs = mismatch(theirs, file.digests) and not self._pin.imported
                    downloads.append(FileDownload(file, data, readers[-1:] if differs else list(readers), theirs))
                self._evict_for(downloads, {*in_use, *(entry.place for entry in entries.values())})

                def adopt(download: FileDownload, digests: dict[str, str]) -> None:
                    entries[download.file.name] = self._cache.adopt(download.data, download.file, digests)

                try:
                    Transfer(downloads, self._add_bytes, adopt, self._retries).run()
                except DiskFullError:
                    self._cache.remove_unreferenced(entries.values())
                    raise
            if elsewhere and not downloads:
                with locked((self._cache.partial / self._partial_name(elsewhere[0])).with_suffix(".lock")):
                    pass  # wait until the other process is done or has failed
            missing = []
            local_files = LocalFiles(self._cache)
            for file in elsewhere:
                entry = local_files.find(file)
                if entry:
                    entries[file.name] = entry
                    self._add_bytes(file.size)
                else:
                    missing.append(file)
        return entries

    def _has_blob(self, file: File) -> bool:
        return any((self._cache.blobs / name).exists() for name in blob_names(file.digests))

    def _partial_name(self, file: File) -> str:
        """The name of a file's partial download, equal for equal bytes in all processes."""
        identity: object = sorted(file.digests.items())
        if not file.digests:
            identity = [self._pin.weights.endpoint_url, self._pin.weights.canonical, file.name, file.version]
        key = hashlib.sha256(json.dumps([identity, file.size]).encode()).hexdigest()[:32]
        # Small files are not resumed, so two processes may download the same one.
        return f"{key}.data" if file.size > PART_BYTES else f"{key}-{os.getpid()}-{abs(hash(file.name))}.data"

    def _evict_for(self, downloads: list[FileDownload], in_use: Collection[str]) -> None:
        needed = sum(download.file.size for download in downloads)
        for download in downloads:
            with contextlib.suppress(FileNotFoundError):
                needed -= min(download.file.size, download.data.stat().st_blocks * 512)
        content = f"{self._pin.weights} ({self._pin.total:,} bytes)"
        self._cache.evict_for(needed, self._keep, content, in_use)

    def _add_bytes(self, count: int) -> None:
        with self._lock:
            self._complete_bytes += count
            self._progress(self._complete_bytes, self._pin.total)

    def _check_sizes(self, entries: dict[str, ManifestEntry]) -> None:
        """Raise WeightsError if a file does not have the size that its own header says: its source was cut off.

        Not for adapters: the engine checks them, and refuses the request for a damaged one for good.
        """
        for name, entry in entries.items():
            if name.endswith(".safetensors") and not name.endswith(ADAPTER_WEIGHTS):
                try:
                    read_shapes(self._cache.path_of(entry))
                except FileNotFoundError:
                    return  # another process has removed it: it cannot be published, and is fetched again
                except ValueError as error:
                    text = f"{self._pin.weights}: {name} is damaged at its source: {error}. Upload it again"
                    raise WeightsError(text) from None

    def _check_shards(self, entries: dict[str, ManifestEntry]) -> None:
        """Raise WeightsError if an index names shards that the source does not have."""
        weights, names = self._pin.weights, {file.name for file in self._pin.files}
        if weights.include or weights.exclude:
            return
        for name, entry in entries.items():
            if name.endswith(INDEXES):
                try:
                    shards = set(json.loads(self._cache.path_of(entry).read_text())["weight_map"].values())
                except (ValueError, KeyError, AttributeError, TypeError):
                    raise WeightsError(f"{weights}: {name} is not a valid index of weights: upload it again") from None
                missing = sorted(s for s in shards if str(PurePosixPath(name).parent / str(s)) not in names)
                # A repository may have both formats, of which only one is fetched.
                if missing and any(n.endswith(PurePosixPath(missing[0]).suffix) for n in names):
                    raise WeightsError(
                        f"{weights}: incomplete: {name} names {missing[0]}, which is not found "
                        f"({len(missing)} of {len(shards)} files are missing). Upload the missing files"
                    )
