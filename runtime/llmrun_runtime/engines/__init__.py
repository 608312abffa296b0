"""Engines: the server processes that run models, and the code that llmrun adds to them. Public interface: `api`."""
