"""Rows of usage and of time per output token, as engines report them."""

from __future__ import annotations

Row = tuple[str, str, int, int, int, int]
"""Key, adapter, requests, tokens of prompts, of answers, and those of prompts that were cached."""
# Seconds for each token after the first: from small models on large GPUs to what nobody calls a stream.
PACE_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.015, 0.02, 0.03, 0.04, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1.0, 2.5)
PaceRow = tuple[str, float, *tuple[int, ...]]
"""Adapter, the sum of the times per output token of its streams, and how many of them fell into each of PACE_BUCKETS,
the last number being those above."""
