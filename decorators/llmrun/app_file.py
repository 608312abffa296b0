"""Imports an app file as a module of its own, and reads paths in it, the same way for all who do."""

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
    """Whether an app file is being imported here: its classes are described then, and nothing is deployed."""
    return _loading.get()


def load_file(path: Path) -> ModuleType:
    """Run `path` as a module named after its stem, with its folder first on `sys.path`.

    Raises whatever the file raises.
    """
    path = path.absolute()
    sys.path.insert(0, str(path.parent))
    loader = importlib.util.spec_from_file_location(path.stem, path)
    if loader is None or loader.loader is None:
        raise ImportError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(loader)
    sys.modules[path.stem] = module
    token = _loading.set(True)
    try:
        loader.loader.exec_module(module)
    finally:
        _loading.reset(token)
    return module


def absolute(spec: ModelSpec, folder: Path) -> ModelSpec:
    """The same, paths in it from the app's folder on."""
    lora = spec.lora and _absolute_lora(spec.lora, folder)
    return spec.model_copy(update={"model": _absolute(spec.model, folder), "lora": lora})


def _absolute(where: Weights, folder: Path) -> Weights:
    """The same, a path from the app's folder on."""
    if not where.path or where.path.startswith("~"):
        return where
    return Weights(os.path.normpath(folder / where.path))


def _absolute_lora(lora: LoRA, folder: Path) -> LoRA:
    found = {name: _absolute(where, folder) for name, where in lora.adapters.items()}
    return lora.model_copy(update={"path": lora.path and _absolute(lora.path, folder), "adapters": found})
