"""Calls of the `llm` command line. Prints their results as JSON."""

import json
import os
import subprocess
import sys
from pathlib import Path

folder = Path(os.environ["LLM_USER_PATH"])
(folder / "extra-openai-models.yaml").write_text(
    f"- model_id: local\n  model_name: talker\n  api_base: {sys.argv[1]}/v1\n  api_key_name: llmrun\n"
)


def ask(*options):
    command = [sys.executable, "-m", "llm", "-m", "local", "--key", "none", "-o", "temperature", "0"]
    command += ["-o", "max_tokens", "12", *options, "Name the capital of France."]
    return subprocess.run(command, check=True, capture_output=True, text=True, stdin=subprocess.DEVNULL).stdout


print(json.dumps({"prompt": ask(), "no stream": ask("--no-stream")}))
