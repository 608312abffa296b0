"""Hugging Face's `transformers serve` as an engine, for models that faster engines do not support. Needs version 5."""

from __future__ import annotations

from llmrun_runtime.engines.base import Launch, to_flags
from llmrun_runtime.engines.sidecar.engine import SOCKET, SidecarEngine


class Transformers(SidecarEngine):
    """It loads its model before it answers any request, and names the model by its folder."""

    name = package = "transformers"
    paths = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/audio/transcriptions"})
    get_paths = ("/health",)  # it has no metrics, and its /v1/models lists the node's whole Hub cache

    def server_model_name(self, launch: Launch) -> str:
        """Return the folder."""
        return launch.weights

    def arguments(self, launch: Launch) -> list[str]:
        """Return the command line of `transformers serve`, with the flags of `engine_args`."""
        module = "llmrun_runtime.engines.sidecar.on_socket"
        program = ("-P", "-m", module, "transformers.cli.transformers:main", SOCKET, "serve", launch.weights)
        args = {"device": "auto" if launch.members[0].devices else "cpu", **launch.engine_args}
        return [launch.python, *program, *to_flags(args)]
