"""Serves two models behind one Ray Serve endpoint: `python builder.py`, then http://127.0.0.1:8000/v1."""

import sys

from models import Assistant, Short
from ray import serve

from llmrun_runtime.builders import build_openai_app

if __name__ == "__main__":
    application = build_openai_app([Assistant, Short])
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if sys.argv[1:] else 8000})
    serve.run(application)
    print("ready", flush=True)
    sys.stdin.read()  # serve until stdin is closed, or Ctrl-C
    serve.shutdown()
