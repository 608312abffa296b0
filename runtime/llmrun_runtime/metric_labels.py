"""What all of llmrun's metrics share: how they call an adapter."""

from __future__ import annotations

from prometheus_client import disable_created_metrics

from llmrun.lora import split_revision

# When each series began would be a series more for each.
disable_created_metrics()  # type: ignore[no-untyped-call]
# A model may have thousands, and each has dozens of series: a page that nobody could read in time.
MOST = 500
OTHERS = "(others)"


class AdapterLabels:
    """Each of the first MOST adapters that are asked for has series of its own; all further ones share theirs."""

    def __init__(self) -> None:
        self._known: set[tuple[str, str]] = set()

    def __call__(self, model: str, adapter: str) -> str:
        """The adapter's name, whatever its revision; "" for the model itself."""
        name, _ = split_revision(adapter)
        if not name or (model, name) in self._known:
            return name
        if len(self._known) >= MOST:
            return OTHERS
        self._known.add((model, name))
        return name
