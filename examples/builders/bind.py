"""Models bound to an ingress by hand, with options of your own for each: `python bind.py`."""

import sys

from models import Assistant, Short
from ray import serve

from llmrun_runtime.builders import OpenAIIngress, build_llm_deployment

if __name__ == "__main__":
    models = {"assistant": build_llm_deployment(Assistant), "short": build_llm_deployment(Short)}
    names = {"assistant": "assistant", "gpt-4o": "assistant", "short": "short"}  # what clients may ask for
    ingress = serve.deployment(OpenAIIngress).options(num_replicas=1, max_ongoing_requests=1000)
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if sys.argv[1:] else 8000})
    serve.run(ingress.bind(names, **models), route_prefix="/llm")
    print("ready", flush=True)
    sys.stdin.read()  # until it is closed, or Ctrl-C
    serve.shutdown()
