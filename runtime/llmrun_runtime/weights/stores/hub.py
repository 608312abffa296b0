"""The Hugging Face Hub: revisions, files and checksums through `huggingface_hub`; bytes by ranged GETs.

`huggingface_hub` reads `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from huggingface_hub import (
    HfApi,
    ModelInfo,
    constants,
    get_hf_file_metadata,
    get_token,
    hf_hub_url,
    try_to_load_from_cache,
)
from huggingface_hub import errors as hub

from llmrun.errors import NotFound, WeightsError
from llmrun.weights import Weights
from llmrun_runtime.weights.pin import File, Pin, select_files
from llmrun_runtime.weights.stores.base import may_send
from llmrun_runtime.weights.stores.ranges import RETRYABLE, HttpReader, Reader, TransferError

TIMEOUT_S = 30
RETRY_WAITS_S = (0.5, 1, 2)


class HubStore:
    """One repository. `retry_waits_s`: the waits between attempts to list it."""

    def __init__(self, weights: Weights, connections: int, retry_waits_s: Sequence[float] = RETRY_WAITS_S) -> None:
        self.name = f"{weights}"
        self._weights = weights
        self._retry_waits_s = retry_waits_s
        self._endpoint = weights.endpoint_url or constants.ENDPOINT
        self._may_send = may_send(weights.endpoint_url or "", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
        self._token: str | bool = (not weights.anonymous and self._may_send and get_token()) or False
        self._commit = weights.revision
        self._urls: dict[str, str] = {}
        self._lock = threading.Lock()
        self.reader: Reader = HttpReader(self, connections)

    def pin(self) -> Pin:
        """See Store."""
        listing = self.list_files()
        return listing.model_copy(update={"files": select_files(listing.files, self._weights)})

    def list_files(self) -> Pin:
        """See Store."""
        if constants.HF_HUB_OFFLINE:
            return self._list_cached_files()
        weights = self._weights
        try:
            info = self._model_info()
        except hub.GatedRepoError:
            page = f"{self._endpoint}/{weights.repo}"
            raise WeightsError(
                f"{weights}: it is gated: accept its licence at {page}, {self._token_advice('of that account')}"
            ) from None
        except hub.RevisionNotFoundError:
            raise NotFound(f"{weights}: {weights.repo} has no revision {weights.revision!r}") from None
        except hub.RepositoryNotFoundError:
            raise WeightsError(
                f"{weights}: repository not found at {self._endpoint}, or it is private: check the name, "
                f"{self._token_advice('with read access')}"
            ) from None
        except Exception as error:  # huggingface_hub passes on its HTTP client's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"{weights}: cannot reach the Hub at {self._endpoint} ({reason}). Without a network: set "
                f"HF_HUB_OFFLINE=1 to use the Hub's cache, or run `llmrun weights import DIR --as {weights}`"
            ) from error
        files = [
            File(
                name=item.rfilename,
                size=item.size or 0,
                digests={"sha256": item.lfs.sha256} if item.lfs else {"git": item.blob_id} if item.blob_id else {},
            )
            for item in info.siblings or ()
        ]
        return Pin(weights=weights, revision=info.sha or weights.revision, files=tuple(files))

    def check_published(self) -> None:
        """See Store: it is a branch, a tag, or a commit of one.

        Anybody can propose a change to a public repository, and the Hub serves its commits by their hashes, too.
        """
        if constants.HF_HUB_OFFLINE:
            return  # nothing is fetched but what is in this node's cache
        api, repo, revision = HfApi(endpoint=self._endpoint, token=self._token), self._weights.repo, self._commit
        try:
            refs = api.list_repo_refs(repo)
            published = {ref.name: ref.target_commit for ref in (*refs.branches, *refs.tags)}
            if revision in published or revision in published.values():
                return
            for tip in sorted(set(published.values())):
                if any(commit.commit_id == revision for commit in api.list_repo_commits(repo, revision=tip)):
                    return
        except Exception as error:  # huggingface_hub passes on its HTTP client's errors
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            text = f"cannot list the branches of {repo} at {self._endpoint} ({reason})"
            raise WeightsError(f"{self._weights}: {text}") from error
        raise NotFound(f"{self._weights}: {revision!r} is not a branch or tag of {repo}, nor a commit of one")

    def _model_info(self) -> ModelInfo:
        """Return the repository at the revision, with retries. Raises the errors of `huggingface_hub`."""
        api = HfApi(endpoint=self._endpoint, token=self._token)
        repo, revision = self._weights.repo, self._weights.revision
        for wait in self._retry_waits_s:
            try:
                return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            except Exception as error:
                response = getattr(error, "response", None)
                if response is not None and response.status_code not in RETRYABLE:
                    raise
            time.sleep(wait)  # the Hub is busy, or the connection broke
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)

    def _token_advice(self, whose: str) -> str:
        if self._token:
            return "and check that the account of this HF_TOKEN has access"
        if not self._may_send and get_token():
            return f"and give the model a token {whose} with env=: a node's own does not go to endpoint_url="
        return f"and set HF_TOKEN to a token {whose} (on the node, or with env=)"

    def _list_cached_files(self) -> Pin:
        """Pin the files in the Hub's cache on this node. Raises WeightsError."""
        weights = self._weights
        folder = Path(constants.HF_HUB_CACHE) / f"models--{weights.repo.replace('/', '--')}"
        ref = folder / "refs" / weights.revision
        commit = ref.read_text().strip() if ref.is_file() else weights.revision
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise WeightsError(
                f"{weights}: not found in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE is set: "
                f"unset it, or run `llmrun weights import DIR --as {weights}`"
            )
        files = []
        for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
            blob = path.resolve().name  # the Hub's cache names blobs by sha256 (LFS) or git's SHA-1
            algorithm = {64: "sha256", 40: "git"}.get(len(blob))
            digests = {algorithm: blob} if algorithm else {}
            files.append(File(name=str(path.relative_to(snapshot)), size=path.stat().st_size, digests=digests))
        return Pin(weights=weights, revision=commit, files=tuple(files))

    def use_pin(self, pin: Pin) -> None:
        """See Store."""
        self._commit = pin.revision

    def local_copy(self, file: File) -> Path | None:
        """The file in this node's Hub cache."""
        path = try_to_load_from_cache(self._weights.repo, file.name, revision=self._commit)
        return Path(path).resolve() if isinstance(path, str) else None

    def locate(self, file: File, *, refresh: bool) -> tuple[str, dict[str, str]]:
        """The URL that the Hub redirects to, requested once per file until it expires. See Locator."""
        if constants.HF_HUB_OFFLINE:
            raise WeightsError(
                f"{self.name}: {file.name} not found in the Hub's cache, and HF_HUB_OFFLINE is set: unset it"
            )
        with self._lock:
            url = None if refresh else self._urls.get(file.name)
        if url is None:
            hub_url = hf_hub_url(self._weights.repo, file.name, revision=self._commit, endpoint=self._endpoint)
            try:
                url = get_hf_file_metadata(
                    hub_url, token=self._token, endpoint=self._endpoint, timeout=TIMEOUT_S
                ).location
            except hub.HfHubHTTPError as error:
                status = error.response.status_code
                if status in RETRYABLE:
                    raise TransferError(f"HTTP status {status} from {self._endpoint}") from error
                raise WeightsError(self.explain(file, status)) from None
            except Exception as error:  # huggingface_hub passes on its HTTP client's errors
                raise TransferError(f"no file location from {self._endpoint} ({type(error).__name__})") from error
            with self._lock:
                self._urls[file.name] = url
        same_host = urlsplit(url)[:2] == urlsplit(self._endpoint)[:2]
        # Never send the Hub's token to the host that it redirects to.
        return url, {"Authorization": f"Bearer {self._token}"} if same_host and self._token else {}

    def explain(self, file: File, status: int) -> str:
        """See Locator."""
        if status == 404:
            return f"{self.name}: {file.name} not found: it was removed since it was pinned. Deploy again"
        return f"{self.name}: cannot read {file.name} (HTTP status {status}): {self._token_advice('with read access')}"
