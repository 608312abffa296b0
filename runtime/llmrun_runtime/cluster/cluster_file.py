"""`cluster.json` in the home: how to reach and stop the cluster that runs from that home."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path


@dataclass(frozen=True)
class ClusterFile:
    """The contents of the file."""

    url: str
    """The ingress's URL."""
    ray_address: str
    pid: int = 0
    """The parent process of a local cluster; 0 if llmrun has joined a Ray cluster that it did not start."""
    temp: str = ""
    """The folder of a local cluster's Ray."""
    tls_cert: str = ""
    """The file with the ingress's certificate; "" for plain HTTP. Commands of this home trust exactly that one."""

    @classmethod
    def read(cls, path: Path) -> ClusterFile | None:
        """Read the file; None if it does not exist or is not valid."""
        try:
            return cls(**json.loads(path.read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, path: Path) -> None:
        """Write the file atomically."""
        draft = path.with_suffix(".new")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)
