"""A cluster as those who attack it see it: from a hostile folder, the network, another user's account."""

from __future__ import annotations

import contextlib
import ipaddress
import pickle
import re
import shutil
import stat
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest

from tests.support.certificates import Authority
from tests.support.cluster import BIN, REPO, Home, free_port, leftovers, new_processes, until, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]
# Modules that the processes of a cluster import sooner or later, from the standard library and from packages.
IMPORTED = (
    *("aiohttp", "cbor2", "certifi", "fsspec", "httptools", "jinja2", "psutil", "queue", "random", "ray", "secrets"),
    *("setproctitle", "sqlite3", "tomllib", "torch", "transformers", "uvicorn", "uvloop", "vllm", "zmq"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with modules that write a file when they are imported."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in IMPORTED:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'imported')!r}, 'a').write('{name} ')\n")
    return folder


@pytest.fixture(scope="module")
def attacked(folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path) -> Iterator[Home]:
    """A cluster that somebody started in that folder, with a model whose engine runs, and with a permissive umask."""
    processes, files = {process.pid for process in psutil.process_iter()}, leftovers()
    root = tmp_path_factory.mktemp("open")
    home = Home(root / "home", free_port())
    home.path.mkdir(mode=0o755)
    command = [str(BIN / "llmrun"), "up", "--port", str(home.port)]
    done = subprocess.run(
        command, cwd=folder, env=home.env, umask=0o022, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr
    try:
        text = f"@llm({str(tiny_weights)!r}, accelerator='cpu', cpus=0.5, idle_timeout=600)\nclass Target: ...\n"
        app = write_app(tmp_path_factory.mktemp("target") / "app.py", text)
        deploy = [str(BIN / "llmrun"), "deploy", str(app), "--yes"]
        done = subprocess.run(
            deploy, cwd=folder, env=home.env, capture_output=True, text=True, check=False, timeout=240
        )
        assert done.returncode == 0, done.stdout + done.stderr
        yield home
    finally:
        home.ok("down")
    assert new_processes(processes) == [] and leftovers() - files == set()


def test_nothing_is_imported_from_the_folder_where_llmrun_is_typed(attacked: Home, folder: Path) -> None:
    assert attacked.ask("target").status_code == 200
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_other_users_can_read_no_file(attacked: Home) -> None:
    open_files = [
        path for path in (attacked.path, *attacked.path.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    assert [path for path in open_files if not path.is_symlink()] == []
    assert (attacked.path / "llmrun.db").is_file() and list((attacked.path / "logs").rglob("*.log"))


def listening(home: Home) -> dict[int, str]:
    """Port → the address that a process of this cluster listens on, for TCP."""
    sockets = {}
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get("LLMRUN_HOME") == str(home.path):
                for found in process.net_connections("tcp"):
                    if found.status == psutil.CONN_LISTEN:
                        sockets[found.laddr.port] = found.laddr.ip.removeprefix("::ffff:")
    return sockets


def test_a_cluster_of_one_machine_listens_on_loopback_only(attacked: Home) -> None:
    sockets = listening(attacked)
    assert attacked.port in sockets and len(sockets) > 10
    assert {port: host for port, host in sockets.items() if not ipaddress.ip_address(host).is_loopback} == {}


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


def test_no_port_unpickles_what_a_stranger_sends_to_ray_serve(attacked: Home, tmp_path: Path) -> None:
    request = ASGIRequest(pickled_request_metadata=pickle.dumps(_Touch(tmp_path / "touched")))
    codes = {}
    for port, host in listening(attacked).items():
        with grpc.insecure_channel(f"{host}:{port}") as channel:
            call = channel.unary_unary(
                "/ray.serve.ASGIService/HandleRequest", request_serializer=ASGIRequest.SerializeToString
            )
            try:
                call(request, timeout=5)
                codes[port] = grpc.StatusCode.OK
            except grpc.RpcError as error:
                codes[port] = error.code()
    assert not (tmp_path / "touched").exists()
    assert grpc.StatusCode.UNAUTHENTICATED in codes.values()  # the replica's server was among them
    assert grpc.StatusCode.OK not in codes.values(), codes


@contextlib.contextmanager
def nginx(folder: Path, upstream: int) -> Iterator[str]:
    """Run nginx with the configuration of the documentation; yields its URL."""
    assert shutil.which("nginx"), "a real nginx is needed: `apt-get install nginx` (`just test` does it where it may)"
    page = (REPO / "docs/how-to/beyond-this-machine.md").read_text()
    block = re.search(r"```nginx\n(.*?)```", page, re.DOTALL)
    assert block
    port, site = free_port(), block[1]
    for documented, here in (
        ("listen 8443", f"listen 127.0.0.1:{port}"),
        ("/etc/ssl/gpu-box.pem", str(folder / "cert.pem")),
        ("/etc/ssl/gpu-box.key", str(folder / "key.pem")),
        ("127.0.0.1:8000", f"127.0.0.1:{upstream}"),
    ):
        assert documented in site
        site = site.replace(documented, here)
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = "".join(f"{kind}_temp_path {folder}/{kind};\n" for kind in kinds)
    text = f"daemon off; pid {folder}/pid; error_log {folder}/error.log;\nevents {{}}\n"
    (folder / "nginx.conf").write_text(text + f"http {{ access_log off;\n{paths}{site}}}\n")
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", str(folder / "error.log")]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        try:
            until((folder / "pid").exists, 10, "nginx has started")
            yield f"https://127.0.0.1:{port}"
        finally:
            process.terminate()


def test_nginx_of_the_documentation_passes_streams_on_event_by_event(attacked: Home, tmp_path: Path) -> None:
    Authority.create(tmp_path).issue("gpu-box.example", tmp_path / "cert.pem", tmp_path / "key.pem")
    key = attacked.ok("key", "create", "proxied").split()[0]
    body = {"model": "target", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    try:
        with nginx(tmp_path, attacked.port) as url, httpx.Client(verify=False, timeout=60) as client:
            headers = {"authorization": f"Bearer {key}", "host": "gpu-box.example"}
            began, arrivals = time.monotonic(), []
            with client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as answer:
                assert answer.status_code == 200, answer.read()
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        arrivals.append(time.monotonic() - began)
            assert len(arrivals) > 100 and arrivals[0] < arrivals[-1] / 2, (arrivals[0], arrivals[-1])
            assert client.get(f"{url}/v1/models", headers={"host": "gpu-box.example"}).status_code == 401
            assert client.get(f"{url}/llmrun/v1/status", headers=headers).status_code == 404
    finally:
        attacked.ok("key", "revoke", "proxied")
