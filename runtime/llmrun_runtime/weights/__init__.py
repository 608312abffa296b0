"""Weights on a node: sources, what a name means at a moment (a pin), transfer, and the cache."""
