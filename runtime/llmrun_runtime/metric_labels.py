"""Adapter labels for the metrics of control and the ingresses, with a bounded number of series."""

from __future__ import annotations

from prometheus_client import disable_created_metrics

from llmrun.lora import split_revision

# A series' creation time would be one more series for each.
disable_created_metrics()  # type: ignore[no-untyped-call]
# A model may have thousands of adapters with dozens of series each, too many for one page.
MAX_ADAPTERS = 500
OTHERS = "(others)"


class AdapterLabels:
    """Gives each of the first MAX_ADAPTERS adapters its own label; all further adapters share OTHERS."""

    def __init__(self) -> None:
        self._seen: set[tuple[str, str]] = set()

    def __call__(self, model: str, adapter: str) -> str:
        """Return the label of an adapter at any revision; "" for the model itself."""
        name, _ = split_revision(adapter)
        if not name or (model, name) in self._seen:
            return name
        if len(self._seen) >= MAX_ADAPTERS:
            return OTHERS
        self._seen.add((model, name))
        return name
