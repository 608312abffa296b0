"""Imports an app file as a module, and resolves the paths in its specs."""

from __future__ import annotations

import importlib.util
import os
import sys
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from llmrun.decorator import collecting, spec_of
from llmrun.errors import HookError
from llmrun.lora import LoRA
from llmrun.spec import ModelSpec
from llmrun.weights import Weights

_loading = ContextVar("_loading", default=False)


@dataclass(frozen=True)
class LoadedFile:
    """An app file's module, and all classes that `@llm` decorated while it ran."""

    module: ModuleType
    decorated: list[type]

    def models(self) -> list[type]:
        """Return the file's model classes: those that it defines, in a loop too, and those that it imports by name."""
        named = [item for item in vars(self.module).values() if isinstance(item, type) and spec_of(item)]
        specs = {id(spec_of(cls)) for cls in named}  # another decorator may have made a copy of the class
        unnamed = [cls for cls in self.decorated if self._defines(cls) and id(spec_of(cls)) not in specs]
        order = {id(spec_of(cls)): index for index, cls in enumerate(self.decorated)}
        found = {id(spec_of(cls)): cls for cls in (*named, *unnamed)}
        return [found[key] for key in sorted(found, key=lambda key: order.get(key, -1))]

    def others(self) -> list[type]:
        """Return the model classes of other files that ran with it, and that it does not import by name."""
        specs = {id(spec_of(cls)) for cls in self.models()}
        return [cls for cls in self.decorated if id(spec_of(cls)) not in specs]

    def find(self, model: str, cls: str) -> Any:
        """Return the class of a model; if no model has this name, the class with this name.

        Raises HookError if there is none, or if several have it.
        """
        for each in self.models():
            if (spec := spec_of(each)) and spec.name == model:
                return each
        if sum(each.__qualname__ == cls for each in self.models()) > 1:
            raise HookError(f"several classes are named {cls}, and none is model {model!r} on this node")
        found: Any = self.module
        for part in cls.split("."):
            found = getattr(found, part, None)
        if found is None:
            raise HookError(f"{self.module.__name__} has no class {cls} on this node")
        return found

    def _defines(self, cls: type) -> bool:
        return cls.__module__ == self.module.__name__


def is_loading() -> bool:
    """Whether `load_file` is importing an app file: its models are only described, and nothing may be deployed."""
    return _loading.get()


def load_file(path: Path) -> LoadedFile:
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
        with collecting() as decorated:
            module_spec.loader.exec_module(module)
    finally:
        _loading.reset(token)
    return LoadedFile(module, decorated)


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
