"""The models that the clients call, deployed once for all tests of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, write_app
from tests.support.vision import make_tiny_vlm

MODELS = ("talker", "embedder", "eyes", "plain")


def without_template(source: Path, folder: Path) -> Path:
    """Copy a model without its chat template."""
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("chat_template.jinja"))
    return folder


@pytest.fixture(scope="package")
def served(cluster: Home, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Home]:
    """The cluster with `talker` (SmolLM2 with tools, alias acme/talker), `embedder`, `eyes` (images) and `plain`."""
    folder = tmp_path_factory.mktemp("clients")
    plain, eyes = without_template(tiny_weights, folder / "plain"), make_tiny_vlm(folder / "eyes")
    tools = '"enable_auto_tool_choice": True, "tool_call_parser": "hermes"'
    usual = "cpus=0.2, idle_timeout=900"
    text = f"""
@llm({str(SMOLLM2)!r}, {usual}, aliases=["acme/talker"], engine_args={{{tools}}})
class Talker: ...

@llm({str(tiny_weights)!r}, {usual}, engine_args={{"runner": "pooling"}})
class Embedder: ...

@llm({str(eyes)!r}, {usual})
class Eyes: ...

@llm({str(plain)!r}, {usual})
class Plain: ...
"""
    done = cluster.run("deploy", write_app(folder / "clients" / "app.py", text))
    assert done.returncode == 0, done.stderr
    shown = " ".join(done.stderr.split())
    assert "plain: no chat template was found" in shown and "talker: no chat template" not in shown
    assert "embedder: no chat template" not in shown
    yield cluster
    for model in MODELS:
        cluster.ok("delete", model, "--yes")


@pytest.fixture(scope="package")
def client(served: Home) -> Iterator[openai.OpenAI]:
    """OpenAI's client, without retries."""
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", timeout=ENGINE_START_S, max_retries=0) as client:
        yield client


@pytest.fixture(scope="package")
def http(served: Home) -> Iterator[httpx.Client]:
    """A client for requests as they are on the wire."""
    with httpx.Client(base_url=served.url, timeout=60) as client:
        yield client
