"""Ray Serve LLM with one model, a rival in benchmarks.

`python -m tests.support.ray_serve_llm WEIGHTS PORT MIN_REPLICAS [LORA_PATH MAX_LOADED]` loads at most MAX_LOADED
adapters at once. It prints `ready`; for each line on standard input, it prints `zero` once no replica is left.
"""

from __future__ import annotations

import sys
import time
from typing import Any

import ray
from ray import serve
from ray.serve.llm import LLMConfig, build_openai_app


def main() -> None:
    """Serve until standard input ends."""
    weights, port, min_replicas, *lora = sys.argv[1:]
    ray.init(num_cpus=8, logging_level="ERROR", log_to_driver=False, include_dashboard=False)
    serve.start(http_options={"host": "127.0.0.1", "port": int(port)})
    config = LLMConfig(
        model_loading_config={"model_id": "m", "model_source": weights},
        placement_group_config={"bundles": [{"CPU": 1}]},
        engine_kwargs={"enforce_eager": True, "kv_cache_memory_bytes": 2**30} | engine_adapters(*lora),
        lora_config={"dynamic_lora_loading_path": lora[0], "max_num_adapters_per_replica": int(lora[1])}
        if lora
        else None,
        deployment_config={
            "autoscaling_config": {
                "min_replicas": int(min_replicas),
                "max_replicas": 1,
                "initial_replicas": int(min_replicas),
                "upscale_delay_s": 0,
                "downscale_delay_s": 1,
                "downscale_to_zero_delay_s": 1,
                "metrics_interval_s": 0.5,
                "look_back_period_s": 1,
            }
        },
    )
    serve.run(build_openai_app({"llm_configs": [config]}), name="llm")
    print("ready", flush=True)
    for _ in sys.stdin:
        while any("LLMServer" in name and d.replica_states for name, d in deployments()):
            time.sleep(0.2)
        print("zero", flush=True)
    serve.shutdown()
    ray.shutdown()


def engine_adapters(path: str = "", max_loaded: str = "") -> dict[str, Any]:
    """Return the engine's options for adapters: one slot for each loaded adapter, as with llmrun."""
    slots = {"max_loras": int(max_loaded), "max_cpu_loras": int(max_loaded), "max_lora_rank": 16} if path else {}
    return {"enable_lora": True, **slots} if path else {}


def deployments() -> list[tuple[str, serve.schema.DeploymentStatusOverview]]:
    """Return the application's deployments by name."""
    return list(serve.status().applications["llm"].deployments.items())


if __name__ == "__main__":
    main()
