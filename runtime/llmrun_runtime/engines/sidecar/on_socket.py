"""`python -m llmrun_runtime.engines.sidecar.on_socket MODULE:FUNCTION SOCKET ARG…`: a server on a Unix socket.

Calls a console script's function with the arguments. Its uvicorn listens on the socket instead of on a port: a port on
loopback is open to every account of the node, the folder of an engine's socket only to its own.
"""

from __future__ import annotations

import functools
import importlib
import sys

import uvicorn


def main() -> None:
    """Run the server."""
    module, _, function = sys.argv[1].partition(":")
    on_socket = functools.partialmethod(uvicorn.Config.__init__, uds=sys.argv[2])
    uvicorn.Config.__init__ = on_socket  # type: ignore[method-assign,assignment]  # for every server of this process
    sys.argv = [module, *sys.argv[3:]]
    getattr(importlib.import_module(module), function)()


if __name__ == "__main__":
    main()
