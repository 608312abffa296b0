"""Models in user-owned Serve applications, on plain Ray: the examples and the output of `llmrun export`."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import psutil
import pytest
import yaml

from tests.support.cluster import BIN, REPO, SMOLLM2, Home, alive, free_port, leftovers, until, write_app
from tests.support.servers import AWS, S3
from tests.support.stub_engine import install, stubs
from tests.support.weights import make_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
EXAMPLES = REPO / "examples/builders"
PARIS = [{"role": "user", "content": "Name the capital of France."}]
START_S = 150


def environment(home: Path, **more: str) -> dict[str, str]:
    """Return an environment that points to no llmrun or Ray cluster."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("LLMRUN_", "RAY_"))}
    clean |= {"PATH": f"{BIN}:{clean['PATH']}", "LLMRUN_HOME": str(home), "MODEL": str(SMOLLM2)}
    return {**clean, "RAY_enable_worker_prestart": "0", **more}


@contextlib.contextmanager
def running(script: Path, home: Path, **more: str) -> Iterator[int]:
    """Run an example on its own Ray and yield the port of Serve's proxy. Check that nothing is left afterwards."""
    files, port = leftovers(), free_port()
    with (home.parent / f"{script.stem}.log").open("w+") as log:
        process = subprocess.Popen(
            [sys.executable, script, str(port)],
            env=environment(home, **more),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin and process.stdout
        try:
            started = next((True for line in iter(process.stdout.readline, "") if line.strip() == "ready"), False)
            assert started, Path(log.name).read_text()[-4000:]
            head = next(p for p in psutil.Process(process.pid).children() if p.name() == "gcs_server")
            assert head.environ()["RAY_USAGE_STATS_ENABLED"] == "0", "Ray reports to nobody"
            assert "Warning" not in Path(log.name).read_text()
            yield port
        finally:
            family = psutil.Process(process.pid).children(recursive=True)
            process.stdin.close()
            process.stdout.close()
            try:
                process.wait(60)
            finally:
                process.kill()
    assert len(family) > 5
    until(lambda: not any(map(alive, family)), 30, "its processes exit")
    assert leftovers() - files == set()


def test_two_models_share_one_serve_endpoint(tmp_path: Path) -> None:
    with running(EXAMPLES / "builder.py", tmp_path / "home") as port:
        url = f"http://127.0.0.1:{port}"
        with openai.OpenAI(base_url=f"{url}/v1", api_key="none", timeout=120, max_retries=0) as client:
            assert [model.id for model in client.models.list()] == ["assistant", "short"]
            body = {"messages": PARIS, "temperature": 0, "max_tokens": 20}
            whole = client.chat.completions.create(model="assistant", **body)  # type: ignore[call-overload]
            assert "Paris" in whole.choices[0].message.content
            chunks = list(client.chat.completions.create(model="acme/assistant", stream=True, **body))  # type: ignore[call-overload]
            assert len(chunks) > 4 and "Paris" in "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
            hooked = client.chat.completions.create(model="short", **body)  # type: ignore[call-overload]
            assert hooked.usage.completion_tokens == 3
            with pytest.raises(openai.NotFoundError, match="Did you mean 'assistant'"):
                client.chat.completions.create(model="asistant", **body)  # type: ignore[call-overload]
            with pytest.raises(openai.BadRequestError):
                client.chat.completions.create(**body | {"model": "assistant", "messages": "none"})  # type: ignore[call-overload]
        assert httpx.post(f"{url}/v1/embeddings", json={"model": "assistant"}, timeout=60).status_code == 404
        invalid = httpx.post(f"{url}/v1/completions", content="{", timeout=60).json()
        assert "is not valid JSON" in invalid["error"]["message"]
        assert httpx.delete(f"{url}/v1/completions", timeout=60).status_code == 405


def test_models_can_be_bound_to_an_ingress_manually(tmp_path: Path) -> None:
    with running(EXAMPLES / "bind.py", tmp_path / "home") as port:
        url = f"http://127.0.0.1:{port}/llm/v1"
        with openai.OpenAI(base_url=url, api_key="none", timeout=120, max_retries=0) as client:
            assert client.models.retrieve("acme/assistant").id == "acme/assistant"
            body = {"messages": PARIS, "temperature": 0, "max_tokens": 20}
            whole = client.chat.completions.create(model="acme/assistant", **body)  # type: ignore[call-overload]
            assert "Paris" in whole.choices[0].message.content
            schema = {"type": "object", "properties": {"city": {"enum": ["Paris"]}}, "required": ["city"]}
            bare = {"type": "json_schema", "json_schema": schema}  # the form in Ray Serve LLM's guide
            whole = client.chat.completions.create(model="assistant", response_format=bare, **body)  # type: ignore[call-overload]
            assert json.loads(whole.choices[0].message.content) == {"city": "Paris"}


STUB = """
import sys
from ray import serve
from llmrun import llm
from llmrun.errors import RequestError
from llmrun_runtime.builders import build_llm_deployment, build_openai_app

@llm("s3://acme/model", engine="stub", accelerator="cpu", cpus=0.1, idle_timeout=6)
class One: ...

class Asking:
    def __init__(self, one):
        self._one = one.options(stream=True)

    async def __call__(self, request):
        try:
            async for answer in self._one.embeddings.remote({"input": "x"}):
                return answer
        except RequestError as error:
            return [error.status, str(error), error.body["error"]["code"]]

application = build_openai_app([One])
asking = serve.deployment(Asking).bind(build_llm_deployment(One))
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1])})
serve.run(application, name="one", route_prefix="/")
serve.run(asking, name="asking", route_prefix="/asking")
print("ready", flush=True)
sys.stdin.read()
serve.shutdown()
"""


def test_serve_app_handles_downloads_disconnects_crashes_and_idling(tmp_path: Path, s3: S3, buckets: Path) -> None:
    make_model(buckets / "acme" / "model")
    (script := tmp_path / "served.py").write_text(STUB)
    more = install(tmp_path / "packages") | AWS | {"AWS_ENDPOINT_URL": s3.url}
    with running(script, tmp_path / "home", **more) as port:
        url, held = f"http://127.0.0.1:{port}/v1/chat/completions", tmp_path / "held"

        def ask() -> httpx.Response:
            return httpx.post(url, json={"model": "one"}, timeout=60)

        (place,) = ask().json()["places"]
        assert place["files"] == ["config.json", "model-0.safetensors", "tokenizer.json"]
        workers = [p for p in psutil.process_iter(["cmdline"]) if "llmrun_runtime.weights.worker" in p.cmdline()]
        assert not workers, "who fetched them has ended"
        hidden = httpx.post(url.replace("chat/completions", "load_lora_adapter"), json={"model": "one"}, timeout=60)
        assert hidden.status_code == 404 and hidden.json()["error"]["code"] == "path_not_found"
        refused = httpx.get(f"http://127.0.0.1:{port}/asking", timeout=60).json()
        message = "one does not support /v1/embeddings"
        assert refused[0] == 404 and message in refused[1] and refused[2] == "path_not_found"

        body = {"model": "one", "hold": str(held), "stream": True}
        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            assert next(stream.iter_lines()).startswith("data: ")
            assert held.exists()
        until(lambda: not held.exists(), 10, "the engine is notified that the client disconnected")

        with httpx.stream("POST", url, json=body, timeout=60) as stream:
            lines = stream.iter_lines()
            assert next(lines).startswith("data: ")
            engine = psutil.Process(int(held.read_text()))
            replica = engine.parent()
            assert replica and replica.cmdline()[0].startswith("ray::ServeReplica:one:one")
            replica.kill()
            *_, last = (line for line in lines if line)
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "stream_broken_off"
        until(lambda: not alive(engine), 10, "the engine exits with its replica")

        def again() -> bool:
            answer = ask()
            assert answer.status_code == 200 or answer.json()["error"]["code"] in ("replica_gone", "model_failed")
            return answer.status_code == 200

        until(again, 60, "another replica answers")
        until(lambda: not stubs(), 90, "the model scales to zero without requests")
        assert ask().status_code == 200


def test_a_model_runs_inside_a_custom_application(tmp_path: Path) -> None:
    with running(EXAMPLES / "composed.py", tmp_path / "home") as port:
        verse = httpx.post(f"http://127.0.0.1:{port}/", content="rain", timeout=120)
        assert verse.status_code == 200 and len(verse.text.split()) > 5


def test_serve_runs_the_output_of_export(tmp_path: Path, home: Home) -> None:
    app = write_app(
        tmp_path / "exported" / "app.py",
        f"@llm({str(SMOLLM2)!r}, name='one', engine='stub', accelerator='cpu', cpus=0.2, env={{'T': Secret('T')}})\n"
        "class One: ...\n"
        f"@llm({str(SMOLLM2)!r}, accelerator='cpu', cpus=0.2)\nclass Other:\n    def on_start(self) -> None: ...\n",
    )
    everything = yaml.safe_load(home.run("export", app).stdout)["applications"][0]["args"]["models"]
    assert everything[0]["env"] == {"T": {"secret": "T"}} and everything[1]["app_file"] == str(app)
    text = home.run("export", f"{app}::One").stdout
    (tmp_path / "serve.yaml").write_text(text + f"http_options: {{port: {(port := free_port())}}}\n")
    files = leftovers()
    with (tmp_path / "serve.log").open("w+") as log:
        env = environment(home.path, T="sesame", **install(tmp_path / "packages"))
        serving = subprocess.Popen([BIN / "serve", "run", tmp_path / "serve.yaml"], env=env, stdout=log, stderr=log)
        try:

            def answer() -> str:
                assert serving.poll() is None, Path(log.name).read_text()[-4000:]
                body = {"model": "one", "messages": PARIS, "temperature": 0, "max_tokens": 20}
                with contextlib.suppress(httpx.TransportError):
                    return httpx.post(f"http://127.0.0.1:{port}/v1/chat/completions", json=body, timeout=60).text
                return ""

            until(lambda: '"places"' in answer(), START_S, "the stub engine answers")
        finally:
            family = psutil.Process(serving.pid).children(recursive=True)
            serving.send_signal(signal.SIGINT)  # same as Ctrl-C
            try:
                serving.wait(60)
            finally:
                serving.kill()
    until(lambda: not any(map(alive, family)), 30, "its processes exit")
    assert leftovers() - files == set()


def test_a_class_can_deploy_itself(cluster: Home) -> None:
    env = {**cluster.env, "MODEL": str(SMOLLM2)}
    done = subprocess.run(
        [sys.executable, EXAMPLES / "deploy.py"], env=env, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == f"from-python {cluster.url}"
    assert "Paris" in cluster.ask("from-python", PARIS[0]["content"], max_tokens=20).text
    exported = yaml.safe_load(cluster.run("export", "--all").stdout)
    assert "from-python" in [model["name"] for model in exported["applications"][0]["args"]["models"]]
    cluster.ok("delete", "from-python", "--yes")
