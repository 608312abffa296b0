"""Brings a pin to this node's cache: what lies here already, then other nodes, then the store."""

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
from llmrun_runtime.weights.cache.cache import Cache, Manifest, ManifestEntry
from llmrun_runtime.weights.cache.digests import digests_of, mismatch
from llmrun_runtime.weights.cache.local_files import LocalFiles
from llmrun_runtime.weights.cache.locks import locked
from llmrun_runtime.weights.pin import File, Pin
from llmrun_runtime.weights.stores.base import Store, open_store
from llmrun_runtime.weights.stores.ranges import HttpReader, Reader
from llmrun_runtime.weights.transfer import CONNECTIONS, PART_BYTES, PATIENCE_S, DiskFull, Job, Transfer

PEER_TIMEOUT_S = 10
# If files vanish while the last ones come (another process makes room), it begins again.
ROUNDS = 3
INDEXES = (".safetensors.index.json", ".bin.index.json")
Report = Callable[[int, int], None]
"""Told `(bytes here, bytes in all)`, from any thread."""


class Peer(BaseModel):
    """Another node's agent, which has the pin."""

    url: str
    token: str


class PeerAddress:
    """Where a peer has a pin's files. See ranges.Address."""

    def __init__(self, peer: Peer, pin: Pin) -> None:
        self.name = f"node {urllib3.util.parse_url(peer.url).host}"
        self._base = f"{peer.url}/{quote(pin.id)}"
        self._headers = {"Authorization": f"Bearer {peer.token}"}

    def locate(self, file: File, *, again: bool) -> tuple[str, dict[str, str]]:
        """See Address."""
        return f"{self._base}/{quote(file.name)}", self._headers

    def explain(self, file: File, status: int) -> str:
        """See Address."""
        return f"{self.name} does not give {file.name} (it answered {status})"

    def manifest(self) -> Manifest | None:
        """The peer's manifest; None if it does not answer with one."""
        try:
            answer = urllib3.request("GET", self._base, headers=self._headers, timeout=PEER_TIMEOUT_S, retries=False)
            return Manifest.model_validate_json(answer.data) if answer.status == 200 else None
        except (urllib3.exceptions.HTTPError, ValueError):
            return None


class Fetcher:
    """Brings one pin. `keep`: the pins that must stay, however little room there is."""

    def __init__(
        self,
        cache: Cache,
        pin: Pin,
        keep: Collection[str] = (),
        peers: Sequence[Peer] = (),
        report: Report = lambda here, total: None,
        patience: float = PATIENCE_S,
    ) -> None:
        self._cache = cache
        self._pin = pin
        self._keep = {*keep, pin.id}
        self._peers = peers
        self._report = report
        self._patience = patience
        self._here = 0
        self._lock = threading.Lock()
        self._store: Store | None = None

    def run(self) -> Manifest:
        """The manifest of the complete pin. Raises WeightsError."""
        pin, cache = self._pin, self._cache
        cache.sweep()
        with locked(cache.lock(pin.id)):
            for _ in range(ROUNDS):
                manifest = cache.find(pin.id) or cache.publish(pin, self._gather())
                if manifest:
                    cache.used(pin.id)
                    return manifest
        raise WeightsError(
            f"{pin.weights}: files of it vanish from {cache.root} as fast as they come: who removes them?"
        )

    def _gather(self) -> dict[str, ManifestEntry]:
        self._here = 0
        entries: dict[str, ManifestEntry] = {}
        missing = []
        known = LocalFiles(self._cache)
        for file in self._pin.files:
            entry = known.find(file) or self._in_the_hubs_cache(file)
            if entry:
                entries[file.name] = entry
                self._came(file.size)
            else:
                missing.append(file)
        # Indexes first: what is not complete at its source is not fetched.
        indexes = [file for file in missing if file.name.endswith(INDEXES)]
        for files in (indexes, [file for file in missing if file not in indexes]):
            if files:
                entries |= self._fetch(files, {entry.place for entry in entries.values()})
            self._check_whole(entries)
        return entries

    def _in_the_hubs_cache(self, file: File) -> ManifestEntry | None:
        """A file of the Hub's cache, if its checksum is right."""
        if self._pin.imported or self._pin.weights.kind != "hub":
            return None
        path = self._source().local(file)
        if path is None or not path.is_file() or path.stat().st_size != file.size:
            return None
        digests = digests_of(path, file.digests)
        return None if mismatch(digests, file.digests) else self._cache.refer(path, file, digests)

    def _source(self) -> Store:
        if self._store is None:
            self._store = open_store(self._pin.weights, CONNECTIONS)
            self._store.use(self._pin)
        return self._store

    def _readers(self) -> tuple[list[Reader], dict[str, dict[str, str]]]:
        """Who has the files, nearest first; and the checksums that the peers have of them."""
        readers: list[Reader] = []
        sums: dict[str, dict[str, str]] = {}
        for peer in self._peers:
            address = PeerAddress(peer, self._pin)
            manifest = address.manifest()
            if manifest:
                readers.append(HttpReader(address, CONNECTIONS, proxies={}))
                sums = {name: entry.digests for name, entry in manifest.entries.items()}
        if not self._pin.imported:
            readers.append(self._source().reader)
        if not readers:
            raise WeightsError(f"{self._pin.weights} was imported, and no node that answers has it: import it again")
        return readers, sums

    def _fetch(self, missing: list[File], using: Collection[str]) -> dict[str, ManifestEntry]:
        """Transfer files. A large one that another process is bringing is left to it, and taken from it.

        `using`: blobs of the pin that are here already.
        """
        readers, sums = self._readers()
        entries: dict[str, ManifestEntry] = {}
        while missing:
            later: list[File] = []
            with contextlib.ExitStack() as locks:
                jobs = []
                for file in missing:
                    # A peer's copy was checked when it came; its checksums say more than the store's may.
                    wanted = file.model_copy(update={"digests": {**file.digests, **sums.get(file.name, {})}})
                    data = self._cache.partial / self._key(file)
                    if file.size > PART_BYTES and not locks.enter_context(locked(data.with_suffix(".lock"), 0)):
                        later.append(file)
                        continue
                    jobs.append(Job(wanted, data, list(readers)))
                self._room(jobs, {*using, *(entry.place for entry in entries.values())})

                def done(job: Job, digests: dict[str, str]) -> None:
                    entries[job.file.name] = self._cache.adopt(job.data, job.file, digests)

                try:
                    Transfer(jobs, self._came, done, self._patience).run()
                except DiskFull:
                    self._cache.drop(entries.values())
                    raise
            if later and not jobs:
                with locked((self._cache.partial / self._key(later[0])).with_suffix(".lock")):
                    pass  # until the other process has it, or gives up
            missing = []
            known = LocalFiles(self._cache)
            for file in later:
                entry = known.find(file)
                if entry:
                    entries[file.name] = entry
                    self._came(file.size)
                else:
                    missing.append(file)
        return entries

    def _key(self, file: File) -> str:
        """The name of what has come of a file: the same for the same bytes, whoever wants them."""
        said: object = sorted(file.digests.items())
        if not file.digests:
            said = [self._pin.weights.endpoint_url, self._pin.weights.canonical, file.name, file.version]
        key = hashlib.sha256(json.dumps([said, file.size]).encode()).hexdigest()[:32]
        # Small ones are not resumed: two processes may bring the same one.
        return f"{key}.data" if file.size > PART_BYTES else f"{key}-{os.getpid()}-{abs(hash(file.name))}.data"

    def _room(self, jobs: list[Job], using: Collection[str]) -> None:
        needed = sum(job.file.size for job in jobs)
        for job in jobs:
            with contextlib.suppress(FileNotFoundError):
                needed -= min(job.file.size, job.data.stat().st_blocks * 512)
        what = f"{self._pin.weights} ({self._pin.total:,} bytes)"
        self._cache.choose_evictions(needed, self._keep, what, using)

    def _came(self, count: int) -> None:
        with self._lock:
            self._here += count
            self._report(self._here, self._pin.total)

    def _check_whole(self, entries: dict[str, ManifestEntry]) -> None:
        """Raise WeightsError if an index names shards that the source does not have."""
        weights, names = self._pin.weights, {file.name for file in self._pin.files}
        if weights.include or weights.exclude:
            return
        for name, entry in entries.items():
            if name.endswith(INDEXES):
                try:
                    shards = set(json.loads(self._cache.where(entry).read_text())["weight_map"].values())
                except (ValueError, KeyError, AttributeError, TypeError):
                    raise WeightsError(f"{weights}: {name} is no index of weights: upload it again") from None
                missing = sorted(s for s in shards if str(PurePosixPath(name).parent / str(s)) not in names)
                # A repository may hold both formats and only one of them is taken.
                if missing and any(n.endswith(PurePosixPath(missing[0]).suffix) for n in names):
                    raise WeightsError(
                        f"{weights}: it is not complete: {name} names {missing[0]}, which is not there "
                        f"({len(missing)} of {len(shards)} files are missing): upload it again"
                    )
