"""Which models can be served without llmrun's control and ingress.

`llmrun_runtime.builders` does so, and `serve run` with the output of `llmrun export`.
"""

from __future__ import annotations

from llmrun.errors import SpecError
from llmrun.markers import Marker, marked
from llmrun.spec import ModelSpec


def check_standalone(spec: ModelSpec) -> str:
    """Return a one-line warning that names the options without effect, or "".

    Raises SpecError if the model cannot be served without control.
    """
    if spec.lora:
        raise SpecError(f"{spec.name}: lora= requires control, which lists and downloads adapters: use `llmrun deploy`")
    if spec.nodes > 1:
        raise SpecError(f"{spec.name}: nodes= requires control: use `llmrun deploy`")
    ignored = [
        f"{name}="
        for name in marked(ModelSpec, Marker.NEEDS_CONTROL)
        if getattr(spec, name) != ModelSpec.model_fields[name].default
    ]
    if not ignored:
        return ""
    return f"{spec.name}: {', '.join(ignored)} has no effect without control: use `llmrun deploy`"
