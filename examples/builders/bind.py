"""Binds a model to an ingress by hand, at your own route: `python bind.py`, then http://127.0.0.1:8000/llm/v1."""

import sys

from models import Assistant
from ray import serve

from llmrun_runtime.builders import OpenAIIngress, build_llm_deployment

if __name__ == "__main__":
    models = {"assistant": build_llm_deployment(Assistant)}
    names = {"assistant": "assistant", "acme/assistant": "assistant"}  # public name → model
    ingress = serve.deployment(OpenAIIngress).options(num_replicas=1, max_ongoing_requests=1000)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if sys.argv[1:] else 8000})
    serve.run(ingress.bind(names, **models), route_prefix="/llm")
    print("ready", flush=True)
    sys.stdin.read()  # serve until stdin is closed, or Ctrl-C
    serve.shutdown()
