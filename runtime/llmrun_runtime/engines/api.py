"""The public interface for authors of engines. Import from here only: other modules of `engines` may change.

An engine is a class that implements `Engine`, named by an entry point in the group `llmrun.engines`.

1. `command(launch)` builds a command line from a `Launch`; `to_flags` converts `launch.engine_args`.
2. Each process of the engine calls `hold()` first. It then exits when its replica does.
3. The server wraps its ASGI app in `Shim`, listens on a port of its choice, and reports it with `notify(port=…)`.
4. An engine whose server cannot do that is a `SidecarEngine`, with PORT in place of the port in its command.
5. `refuses(spec)` rejects models. Other methods raise `EngineError`; those of a `Loader` raise `AdapterError`.
6. Tokens are counted with `usage_meter`: `usage_meter.current()` is the request that the current task serves.

Stable: the entry point group, the names in `__all__`, their signatures and fields. CHANGELOG.md announces changes.

Names are imported on first use, so a process that only calls `hold()` loads nothing but the standard library.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from llmrun.errors import EngineError
    from llmrun.spec import ModelSpec
    from llmrun_runtime.engines.base import Engine, Launch, Loader, Member, ShimConfig, TokenLogprobs, to_flags
    from llmrun_runtime.engines.shim import usage_meter
    from llmrun_runtime.engines.shim.adapter_slots import AdapterError
    from llmrun_runtime.engines.shim.lease import hold, notify
    from llmrun_runtime.engines.shim.middleware import Shim
    from llmrun_runtime.engines.sidecar.engine import PORT, SOCKET, SidecarConfig, SidecarEngine

__all__ = [
    "PORT",
    "SOCKET",
    "AdapterError",
    "Engine",
    "EngineError",
    "Launch",
    "Loader",
    "Member",
    "ModelSpec",
    "Shim",
    "ShimConfig",
    "SidecarConfig",
    "SidecarEngine",
    "TokenLogprobs",
    "hold",
    "notify",
    "to_flags",
    "usage_meter",
]

_MODULES = {
    "llmrun.errors": ("EngineError",),
    "llmrun.spec": ("ModelSpec",),
    "llmrun_runtime.engines.base": ("Engine", "Launch", "Loader", "Member", "ShimConfig", "TokenLogprobs", "to_flags"),
    "llmrun_runtime.engines.shim.adapter_slots": ("AdapterError",),
    "llmrun_runtime.engines.shim.lease": ("hold", "notify"),
    "llmrun_runtime.engines.shim.middleware": ("Shim",),
    "llmrun_runtime.engines.sidecar.engine": ("PORT", "SOCKET", "SidecarConfig", "SidecarEngine"),
}
_MODULE_OF = {name: module for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name == "usage_meter":
        return importlib.import_module("llmrun_runtime.engines.shim.usage_meter")
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
