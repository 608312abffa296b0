"""Models that do not only generate text: real embeddings, compared with those of transformers, and images."""

from __future__ import annotations

import base64
import math
import struct
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.support.cluster import ENGINE_START_S, SMOLLM2, Home, write_app
from tests.support.vision import data_url, make_tiny_vlm, make_torchvision_vlm

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
TEXTS = ["a small town", "a little village", "the theory of numbers", "Zahlentheorie und Ähnliches", "x" * 300]


def by_transformers(folder: Path, texts: list[str]) -> list[list[float]]:
    """Return the embeddings as the model card computes them: mean over the tokens, normalized to length 1."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder)
    given = tokenizer(texts, padding=True, truncation=True, max_length=256, return_tensors="pt")
    with torch.no_grad():
        states = model(**given).last_hidden_state
    mask = given["attention_mask"].unsqueeze(-1).float()
    mean = (states * mask).sum(1) / mask.sum(1)
    embeddings: list[list[float]] = torch.nn.functional.normalize(mean, dim=1).tolist()
    return embeddings


def test_embeddings_match_those_of_transformers(cluster: Home, minilm: Path, tmp_path: Path) -> None:
    text = f"@llm({str(minilm)!r}, task='embed', cpus=0.2, idle_timeout=600)\nclass MiniLM: ...\n"
    cluster.ok("deploy", write_app(tmp_path / "minilm" / "app.py", text))
    expected = by_transformers(minilm, TEXTS)
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=ENGINE_START_S) as client:
        # The client requests base64 by default.
        batch = [row.embedding for row in client.embeddings.create(model="mini-lm", input=TEXTS).data]
        single = client.embeddings.create(model="mini-lm", input=TEXTS[0], encoding_format="float").data[0].embedding
    for actual, reference in zip([*batch, single], [*expected, expected[0]], strict=True):
        assert len(actual) == 384 and max(abs(a - b) for a, b in zip(actual, reference, strict=True)) < 1e-2
    body = {"model": "mini-lm", "input": TEXTS[:1], "encoding_format": "base64"}
    raw = base64.b64decode(httpx.post(f"{cluster.url}/v1/embeddings", json=body).json()["data"][0]["embedding"])
    assert math.dist(struct.unpack("<384f", raw), single) < 1e-2
    body = {"model": "mini-lm", "query": TEXTS[0], "documents": TEXTS[1:3]}
    ranked = httpx.post(f"{cluster.url}/rerank", json=body).json()["results"]
    assert [row["index"] for row in ranked] == [0, 1]
    cluster.ok("delete", "mini-lm", "--yes")


@pytest.fixture
def pictures() -> Iterator[tuple[str, list[str]]]:
    """Run a server of one image; yield its URL and the list of requested paths."""
    paths: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            if self.path == "/elsewhere.png":
                self.send_response(302)
                self.send_header("Location", "/red.png")
                self.end_headers()
                return
            self.send_response(200)
            self.end_headers()
            self.wfile.write(base64.b64decode(data_url((255, 0, 0)).partition(",")[2]))

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", paths
    server.shutdown()
    server.server_close()


def test_images_in_the_request_and_from_allowed_hosts(
    cluster: Home, tmp_path: Path, pictures: tuple[str, list[str]]
) -> None:
    url, paths = pictures
    weights = make_tiny_vlm(tmp_path / "vlm")
    more = "cpus=0.2, idle_timeout=600, "
    text = f"@llm({str(weights)!r}, {more})\nclass Eyes: ...\n"
    app = write_app(tmp_path / "eyes" / "app.py", text)
    cluster.ok("deploy", app)

    def look(picture: str) -> httpx.Response:
        image = {"type": "image_url", "image_url": {"url": picture}}
        messages = [{"role": "user", "content": [{"type": "text", "text": "What is it?"}, image]}]
        body = {"model": "eyes", "messages": messages, "max_tokens": 8, "temperature": 0}
        body |= {"logprobs": True, "ignore_eos": True}
        return httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=ENGINE_START_S)

    def sure(answer: httpx.Response) -> list[float]:
        assert answer.status_code == 200, answer.text
        return [token["logprob"] for token in answer.json()["choices"][0]["logprobs"]["content"]]

    red, blue = sure(look(data_url((255, 0, 0)))), sure(look(data_url((0, 0, 255))))
    assert max(abs(a - b) for a, b in zip(red, blue, strict=True)) > 1e-3, "it sees the picture"
    refused = look(f"{url}/red.png")
    assert refused.status_code == 400 and "engine_args allowed_media_domains=" in refused.text and paths == []
    app.write_text(app.read_text().replace(more, more + "engine_args={'allowed_media_domains': ['127.0.0.1']}, "))
    cluster.ok("deploy", app)
    assert sure(look(f"{url}/red.png")) == pytest.approx(red, abs=0.05)
    assert look(f"{url}/elsewhere.png").status_code != 200 and paths == ["/red.png", "/elsewhere.png"]
    assert look(f"{url.replace('127.0.0.1', 'localhost')}/red.png").status_code == 400
    cluster.ok("delete", "eyes", "--yes")


def test_a_missing_torchvision_is_reported_with_the_pip_command(cluster: Home, tmp_path: Path) -> None:
    weights = make_torchvision_vlm(tmp_path / "llava", SMOLLM2)
    error = cluster.fails(
        "deploy", write_app(tmp_path / "app.py", f"@llm({str(weights)!r}, cpus=0.2)\nclass Needy: ...\n")
    )
    assert "No module named 'torchvision': pip install torchvision where the engine runs, the version that" in error
