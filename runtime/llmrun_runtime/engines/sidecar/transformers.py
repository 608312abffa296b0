"""Hugging Face's `transformers serve` as an engine: for models that no fast engine has yet. Needs transformers 5."""

from __future__ import annotations

from llmrun_runtime.engines.base import Launch, to_flags
from llmrun_runtime.engines.sidecar.engine import PORT, SidecarEngine


class Transformers(SidecarEngine):
    """It loads its model before it answers anything, and knows that by its folder alone."""

    name = package = "transformers"
    paths = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/audio/transcriptions"})
    reads = ("/health",)  # it has no metrics, and lists what lies in the node's Hub cache as its models

    def called(self, launch: Launch) -> str:
        """The folder."""
        return launch.weights

    def arguments(self, launch: Launch) -> list[str]:
        """Its own program, with the flags of `engine_args`."""
        program = ("-c", "from transformers.cli.transformers import main; main()", "serve", launch.weights)
        args = {"device": "auto" if launch.members[0].devices else "cpu", **launch.engine_args}
        return [launch.python, *program, "--host", "127.0.0.1", "--port", PORT, *to_flags(args)]
