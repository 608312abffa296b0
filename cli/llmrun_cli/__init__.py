"""The `llmrun` command line, a client of control's HTTP API."""
