"""The log files of a node: one per replica, with its engine's and shim's lines, and control's and the ingress's."""

from __future__ import annotations

import logging
import time
from logging.handlers import RotatingFileHandler
from pathlib import Path

LOG_BYTES, LOG_FILES = 10 * 2**20, 3
KEEP_FILES = 20  # per model and node


def log_to_file(root: Path, name: str) -> None:
    """Write this process's log to `logs/NAME.log` in the home."""
    (root / "logs").mkdir(parents=True, exist_ok=True)
    handler = RotatingFileHandler(root / "logs" / f"{name}.log", maxBytes=LOG_BYTES, backupCount=LOG_FILES)
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", handlers=[handler], force=True
    )


def model_logs(root: Path) -> Path:
    """The folder of all models' logs in a home. The folder above it has only logs of Ray and of the cluster."""
    return root / "logs" / "models"


def log_path(root: Path, model: str, version: int, replica: str) -> Path:
    """The log file of one replica. Removes the model's oldest logs above KEEP_FILES."""
    folder = model_logs(root) / model
    for old in sorted(_files(folder), key=lambda file: file.stat().st_mtime)[: -(KEEP_FILES - 1)]:
        old.unlink(missing_ok=True)
    return folder / f"v{version}-{replica[:12]}.log"


def read_logs(root: Path, model: str, offsets: dict[str, int], tail: int) -> dict[str, tuple[int, str]]:
    """The new text of each of the model's logs on this node: file name → (offset after the text, text).

    A file that is not in `offsets` starts at its last `tail` lines. At most 1 MiB per file and call.
    """
    texts: dict[str, tuple[int, str]] = {}
    for path in sorted(_files(model_logs(root) / model), key=lambda file: file.stat().st_mtime):
        data = path.read_bytes()
        if path.name in offsets:
            chunk = data[offsets[path.name] :][: 2**20]
            end = offsets[path.name] + len(chunk)
        else:
            chunk, end = b"".join(data.splitlines(keepends=True)[-tail:]) if tail else b"", len(data)
        texts[path.name] = (end, chunk.decode(errors="replace"))
    return texts


def _files(folder: Path) -> list[Path]:
    return list(folder.glob("*.log")) if folder.is_dir() else []


def write_log(log: Path, text: str) -> None:
    """Append a line of llmrun to an engine's log. Raises OSError."""
    with log.open("a") as file:
        file.write(f"[llmrun] {time.strftime('%H:%M:%S')} {text}\n")
