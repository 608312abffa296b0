"""What a model may say that is served without llmrun's control and ingress: by `llmrun_runtime.builders`, or by
`serve run` of what `llmrun export` prints."""

from __future__ import annotations

from llmrun.spec import ModelSpec

# What control and llmrun's ingress do, and nobody does without them.
OF_CONTROL = ("schedule", "min_uptime", "evictable", "rpm", "tpm", "max_in_flight", "log_engine_metrics")


def refused_alone(spec: ModelSpec) -> str:
    """Why such a model cannot be served without control, in one line; "" if it can."""
    if spec.lora:
        return f"{spec.name}: lora= needs control, which lists and brings adapters: `llmrun deploy`"
    if spec.nodes > 1:
        return f"{spec.name}: nodes= needs control: `llmrun deploy`"
    return ""


def lost_alone(spec: ModelSpec) -> str:
    """What was said of a model and does nothing without control, in one line; "" if there is nothing."""
    lost = [name for name in OF_CONTROL if getattr(spec, name) != ModelSpec.model_fields[name].default]
    return f"{spec.name}: {'=, '.join(lost)}= does nothing without control: `llmrun deploy`" if lost else ""
