"""Deploys a model from Python: starts a cluster if none is running, and waits until the model answers."""

import os

from llmrun import deploy, llm


@llm(os.environ.get("MODEL", "HuggingFaceTB/SmolLM2-135M-Instruct"), name="from-python", cpus=0.2)
class Assistant: ...


if __name__ == "__main__":
    deployment = deploy(Assistant)
    print(deployment.model, deployment.url)
