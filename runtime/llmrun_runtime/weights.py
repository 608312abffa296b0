"""Where a model's weights lie on this node."""

from __future__ import annotations

from pathlib import Path

from llmrun.errors import EngineError
from llmrun.spec import ModelSpec


def local_path(spec: ModelSpec) -> Path | None:
    """The folder that `model` names, `~` as on this node; None if it is a source."""
    return Path(spec.path).expanduser() if spec.path else None


def weights_for_engine(spec: ModelSpec, where: str) -> str:
    """What the engine is told to load. Raises EngineError if it is a path that is not on this node."""
    path = local_path(spec)
    if path and not path.exists():
        raise EngineError(f"model={spec.model!r}: there is no such path on {where}")
    return str(path) if path else spec.model
