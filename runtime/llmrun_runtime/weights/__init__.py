"""Weights on a node: sources, pins, transfers and the node's cache."""
