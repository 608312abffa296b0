"""Readers of app files."""
