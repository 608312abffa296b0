"""Imports an app file as a module of its own, the same way for the command line and beside the engine."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType


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
    loader.loader.exec_module(module)
    return module
