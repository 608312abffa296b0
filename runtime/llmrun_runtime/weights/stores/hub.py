"""Hugging Face: revisions, files and checksums through `huggingface_hub`; bytes by ranges from where it points to.

`huggingface_hub` reads `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_CACHE` and `HF_HUB_OFFLINE` itself.
"""

from __future__ import annotations

import threading
import time
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
from llmrun_runtime.weights.pin import File, Pin, choose
from llmrun_runtime.weights.stores.ranges import PASSING, HttpReader, Reader, TransferError

TIMEOUT_S = 30
WAITS_S = (0.5, 1, 2)


class HubStore:
    """One repository."""

    def __init__(self, weights: Weights, connections: int) -> None:
        self.name = f"{weights}"
        self._weights = weights
        self._endpoint = weights.endpoint_url or constants.ENDPOINT
        self._token: str | bool = False if weights.anonymous else (get_token() or False)
        self._commit = weights.revision
        self._locations: dict[str, str] = {}
        self._lock = threading.Lock()
        self.reader: Reader = HttpReader(self, connections)

    def pin(self) -> Pin:
        """The commit that the revision means now, and its files. Raises WeightsError."""
        listed = self.listed()
        return listed.model_copy(update={"files": choose(listed.files, self._weights)})

    def listed(self) -> Pin:
        """See Store."""
        if constants.HF_HUB_OFFLINE:
            return self._listed_in_cache()
        weights = self._weights
        try:
            info = self._info()
        except hub.GatedRepoError:
            page = f"{self._endpoint}/{weights.repo}"
            raise WeightsError(
                f"{weights}: it is gated: accept its licence at {page}, {self._token_advice('of that account')}"
            ) from None
        except hub.RevisionNotFoundError:
            raise NotFound(f"{weights}: {weights.repo} has no revision {weights.revision!r}") from None
        except hub.RepositoryNotFoundError:
            raise WeightsError(
                f"{weights}: {self._endpoint} has no such repository, or it is private: check the name, "
                f"{self._token_advice('that may read it')}"
            ) from None
        except Exception as error:  # whatever its HTTP client raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise WeightsError(
                f"{weights}: {self._endpoint} cannot be asked ({reason}); without a network: HF_HUB_OFFLINE=1 takes "
                f"what lies in the Hub's cache, `llmrun weights import DIR --as {weights}` takes a folder"
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

    def _info(self) -> ModelInfo:
        """The repository at the revision; a busy Hub is asked again. Raises what `huggingface_hub` does."""
        api = HfApi(endpoint=self._endpoint, token=self._token)
        repo, revision = self._weights.repo, self._weights.revision
        for wait in WAITS_S:
            try:
                return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)
            except Exception as error:
                response = getattr(error, "response", None)
                if response is not None and response.status_code not in PASSING:
                    raise
            time.sleep(wait)  # it is busy, or the connection broke
        return api.model_info(repo, revision=revision, files_metadata=True, timeout=TIMEOUT_S)

    def _token_advice(self, whose: str) -> str:
        if self._token:
            return "and see to it that the account of this HF_TOKEN may read it"
        return f"and set HF_TOKEN to a token {whose} (on the node, or with env=)"

    def _listed_in_cache(self) -> Pin:
        """What the Hub's cache has of it. Raises WeightsError."""
        weights = self._weights
        folder = Path(constants.HF_HUB_CACHE) / f"models--{weights.repo.replace('/', '--')}"
        ref = folder / "refs" / weights.revision
        commit = ref.read_text().strip() if ref.is_file() else weights.revision
        snapshot = folder / "snapshots" / commit
        if not snapshot.is_dir():
            raise WeightsError(
                f"{weights}: HF_HUB_OFFLINE is set and {constants.HF_HUB_CACHE} does not have it: "
                f"unset it, or `llmrun weights import DIR --as {weights}`"
            )
        files = []
        for path in sorted(p for p in snapshot.rglob("*") if p.is_file()):
            blob = path.resolve().name  # the cache names blobs by sha256 (LFS) or git's SHA-1
            algorithm = {64: "sha256", 40: "git"}.get(len(blob))
            digests = {algorithm: blob} if algorithm else {}
            files.append(File(name=str(path.relative_to(snapshot)), size=path.stat().st_size, digests=digests))
        return Pin(weights=weights, revision=commit, files=tuple(files))

    def use(self, pin: Pin) -> None:
        """Read the files of that pin from now on."""
        self._commit = pin.revision

    def local(self, file: File) -> Path | None:
        """The file in the node's Hub cache, if it lies there."""
        found = try_to_load_from_cache(self._weights.repo, file.name, revision=self._commit)
        return Path(found).resolve() if isinstance(found, str) else None

    def locate(self, file: File, *, again: bool) -> tuple[str, dict[str, str]]:
        """The address that the Hub redirects to; asked for once per file, as long as it is good."""
        if constants.HF_HUB_OFFLINE:
            raise WeightsError(f"{self.name}: HF_HUB_OFFLINE is set and the Hub's cache has no {file.name}: unset it")
        with self._lock:
            url = None if again else self._locations.get(file.name)
        if url is None:
            asked = hf_hub_url(self._weights.repo, file.name, revision=self._commit, endpoint=self._endpoint)
            try:
                url = get_hf_file_metadata(
                    asked, token=self._token, endpoint=self._endpoint, timeout=TIMEOUT_S
                ).location
            except hub.HfHubHTTPError as error:
                status = error.response.status_code
                if status in PASSING:
                    raise TransferError(f"{self._endpoint} answered {status}") from error
                raise WeightsError(self.explain(file, status)) from None
            except Exception as error:  # whatever its HTTP client raises
                raise TransferError(f"{self._endpoint} does not say where it is ({type(error).__name__})") from error
            with self._lock:
                self._locations[file.name] = url
        same = urlsplit(url)[:2] == urlsplit(self._endpoint)[:2]
        # The token is the Hub's: never for the host that it redirects to.
        return url, {"Authorization": f"Bearer {self._token}"} if same and self._token else {}

    def explain(self, file: File, status: int) -> str:
        """See Address."""
        if status == 404:
            return f"{self.name}: {file.name} is not there any more: deploy again"
        return f"{self.name}: {file.name} cannot be read (the Hub answered {status}): {self._token_advice('for it')}"
