"""The row types in which engines report usage and time per output token."""

from __future__ import annotations

Row = tuple[str, str, int, int, int, int]
"""Key, adapter, requests, prompt tokens, completion tokens, cached prompt tokens."""
# Seconds per token after the first: from small models on large GPUs to the slowest stream that is still usable.
PACE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
PaceRow = tuple[str, float, *tuple[int, ...]]
"""Adapter, the sum of its streams' times per output token (seconds), and the number of streams in each of PACE_BUCKETS;
the last number counts the streams above the largest bucket."""
