"""`llmrun deploy` from Python: starts a cluster if none runs, and returns when the model answers."""

import os

from llmrun import llm


@llm(os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"), name="from-python", cpus=0.2)
class Assistant: ...


if __name__ == "__main__":
    deployed = Assistant.deploy()  # type: ignore[attr-defined]
    print(deployed.model, deployed.url)
