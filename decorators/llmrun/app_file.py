"""Imports an app file as a module, and resolves the paths in its specs."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType

from llmrun.lora import LoRA
from llmrun.spec import ModelSpec
from llmrun.weights import Weights

_loading = ContextVar("_loading", default=False)


def is_loading() -> bool:
    """Whether `load_file` is importing an app file: its models are only described, and nothing may be deployed."""
    return _loading.get()


def load_file(path: Path) -> ModuleType:
    """Run `path` as a module named after its stem, with its folder first on `sys.path`.

    Raises whatever the file raises.
    """
    path = path.absolute()
    sys.path.insert(0, str(path.parent))
    module_spec = importlib.util.spec_from_file_location(path.stem, path)
    if module_spec is None or module_spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[path.stem] = module
    token = _loading.set(True)
    try:
        module_spec.loader.exec_module(module)
    finally:
        _loading.reset(token)
    return module


def resolve_paths(spec: ModelSpec, folder: Path) -> ModelSpec:
    """Return a copy whose relative paths are resolved against the app file's folder."""
    lora = spec.lora and _resolve_lora(spec.lora, folder)
    return spec.model_copy(update={"model": _resolve_weights(spec.model, folder), "lora": lora})


def _resolve_weights(weights: Weights, folder: Path) -> Weights:
    if not weights.path or weights.path.startswith("~"):
        return weights
    return Weights(os.path.normpath(folder / weights.path))


def _resolve_lora(lora: LoRA, folder: Path) -> LoRA:
    adapters = {name: _resolve_weights(source, folder) for name, source in lora.adapters.items()}
    return lora.model_copy(update={"path": lora.path and _resolve_weights(lora.path, folder), "adapters": adapters})
