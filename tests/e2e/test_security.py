"""A cluster as those who attack it see it: from a hostile folder, the network, another user's account."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import pickle
import random
import re
import shutil
import stat
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import httpx
import psutil
import pytest
from ray.serve.generated.serve_pb2 import ASGIRequest

from tests.support.attacks import (
    RAW,
    Listener,
    as_another_account,
    drip,
    fuzz,
    intrusions,
    listeners,
    open_paths,
    pace,
    refusals,
    send,
    slow_connections,
    unix_sockets,
)
from tests.support.certificates import Authority
from tests.support.cluster import BIN, REPO, Home, free_port, leftovers, new_processes, started_since, write_app
from tests.support.network_attack import CLUSTER
from tests.support.nginx import nginx

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
def before() -> set[int]:
    """The processes that ran before the attacked cluster."""
    return {process.pid for process in psutil.process_iter()}


@pytest.fixture(scope="module")
def attacked(
    before: set[int], folder: Path, tmp_path_factory: pytest.TempPathFactory, tiny_weights: Path
) -> Iterator[Home]:
    """A cluster that somebody started in that folder, with a model whose engine runs, and with a permissive umask."""
    files = leftovers()
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
    assert new_processes(before) == [] and leftovers() - files == set()


def test_nothing_is_imported_from_the_folder_where_llmrun_is_typed(attacked: Home, folder: Path) -> None:
    assert attacked.ask("target").status_code == 200
    assert not (folder / "imported").exists(), (folder / "imported").read_text()


def test_other_users_can_read_no_file(attacked: Home) -> None:
    open_files = [
        path for path in (attacked.path, *attacked.path.rglob("*")) if stat.S_IMODE(path.lstat().st_mode) & 0o077
    ]
    assert [path for path in open_files if not path.is_symlink()] == []
    assert (attacked.path / "llmrun.db").is_file() and list((attacked.path / "logs").rglob("*.log"))


ENGINE = r"llmrun: vllm target|llmrun_runtime\.engines\.vllm"  # forked, or started as a plain process


@pytest.fixture
def listening(attacked: Home, before: set[int]) -> list[Listener]:
    """The TCP sockets of the cluster, its engines' among them."""
    found = listeners(started_since(before))
    titles = " ".join(each.title for each in found)
    assert attacked.port in {each.port for each in found} and re.search(ENGINE, titles)
    return found


# The rows of the documentation's table: whose sockets they are, by the process's title. The others need a second node,
# or an engine that is no part of this cluster.
ROWS = {
    "ingress": r"ray::IngressActor",
    "control's API": r"ray::Control",
    "a replica's link": ENGINE,
    "vLLM's server": ENGINE,
    "the lease of an engine": r"ray::ServeReplica",
    "torch's process groups in an engine": r"VLLM::EngineCore",
    "Ray: GCS, raylets, workers, agents, client server, Serve's gRPC in replicas": (
        r"gcs_server|raylet|ray::|ray\.util\.client|llmrun_runtime\.cluster\.bootstrap|dashboard"
    ),
}


def test_every_socket_is_in_the_documentation(listening: list[Listener]) -> None:
    page = (REPO / "docs/explanation/security.md").read_text()
    documented = set(re.findall(r"^\| ([^|]+?) \| [^|]+ \| [^|]+ \|$", page, re.MULTILINE))
    assert ROWS.keys() <= documented
    unknown = [each for each in listening if not any(re.search(title, each.title) for title in ROWS.values())]
    assert unknown == []
    missing = [row for row, title in ROWS.items() if not any(re.search(title, each.title) for each in listening)]
    assert missing == []
    assert len([each for each in listening if re.search(ENGINE, each.title)]) == 2  # its server, and its link


def test_a_cluster_of_one_machine_listens_on_loopback_only(listening: list[Listener]) -> None:
    assert [each for each in listening if not ipaddress.ip_address(each.host).is_loopback] == []


def test_no_socket_takes_a_strangers_request(attacked: Home, listening: list[Listener]) -> None:
    key = attacked.ok("key", "create", "closed").split()[0]  # so that the ingress is not open
    attacked.more_env["LLMRUN_API_KEY"] = key
    try:
        with ThreadPoolExecutor(16) as pool:
            taken = zip(listening, pool.map(refusals, listening), strict=True)
            answers = {(each.title, what) for each, taken_here in taken for what in taken_here}
        assert answers == {("ray::IngressActor", "GET /metrics")}  # the documentation says so
    finally:
        del attacked.more_env["LLMRUN_API_KEY"]
        attacked.ok("key", "revoke", "closed")


def memory(processes: list[psutil.Process]) -> dict[int, int]:
    """Resident bytes of each process."""
    sizes = {}
    for process in processes:
        with contextlib.suppress(psutil.Error):
            sizes[process.pid] = process.memory_info().rss
    return sizes


def test_random_bytes_harm_no_process(attacked: Home, before: set[int], listening: list[Listener]) -> None:
    listened = {each.pid for each in listening}
    processes = [process for process in started_since(before) if process.pid in listened]  # a fork server still imports
    sizes = memory(processes)
    addresses = [(each.host, each.port) for each in listening]
    fuzz(addresses, seed=20, rounds=3)
    assert attacked.ask("target").status_code == 200 and "target" in attacked.ok("status")
    now = memory(processes)
    assert listened <= now.keys(), "a process died"
    grown = {pid: (now[pid] - size) >> 20 for pid, size in sizes.items() if pid in now and now[pid] - size > 64 * 2**20}
    assert grown == {}, "MiB"


@pytest.mark.parametrize("name", RAW)
def test_what_is_not_one_well_formed_request_is_refused(attacked: Home, name: str) -> None:
    request, allowed = RAW[name]
    answer = send(("127.0.0.1", attacked.port), request)
    status = answer.removeprefix(b"HTTP/1.1 ")[:3]
    assert any(status.startswith(each) if each else not answer for each in allowed), answer[:300]
    assert answer.count(b"HTTP/1.1 ") <= 1, answer


def test_honest_callers_hardly_notice_an_attack(attacked: Home, before: set[int]) -> None:
    """50 callers, with and without an attack, in turns."""
    address = ("127.0.0.1", attacked.port)
    body = {"model": "target", "prompt": "Hi", "max_tokens": 2}
    ingress = next(process for process in started_since(before) if "IngressActor" in " ".join(process.cmdline()))
    size, statuses = ingress.memory_info().rss, set()
    limits = httpx.Limits(max_connections=50, max_keepalive_connections=50)
    with httpx.Client(base_url=attacked.url, timeout=60, limits=limits) as client, ThreadPoolExecutor(60) as pool:

        def ask() -> None:
            statuses.add(client.post("/v1/completions", json=body).status_code)

        def measure(until: float) -> list[float]:
            time.sleep(random.random())  # not all in step
            return pace(ask, 2.0, until)

        def attack(until: float) -> None:
            chance = random.Random(7)
            with slow_connections(address, 300) as slow:
                while time.monotonic() < until:
                    drip(slow)
                    for name in chance.sample(sorted(RAW), 5):
                        send(address, RAW[name][0], 1)
                    send(address, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * 100, 1)
                    time.sleep(0.2)

        medians: dict[bool, list[float]] = {False: [], True: []}
        for number in range(6):
            hostile, until = bool(number % 2), time.monotonic() + 8
            attacks = [pool.submit(attack, until)] if hostile else []
            callers = [pool.submit(measure, until) for _ in range(50)]
            medians[hostile].append(statistics.median(took for caller in callers for took in caller.result()))
            for each in attacks:
                each.result()
    assert statuses == {200}
    quiet, loud = statistics.median(medians[False]), statistics.median(medians[True])
    assert loud <= 1.3 * quiet + 0.005, medians
    assert ingress.memory_info().rss - size < 64 * 2**20


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become another account")
def test_another_account_of_the_machine_gets_nothing(attacked: Home, before: set[int]) -> None:
    processes = started_since(before)
    shared = [str(path) for path in Path("/dev/shm").iterdir() if path.is_file()]
    temp = Path(json.loads((attacked.path / "cluster.json").read_text())["temp"])
    files = [*open_paths(attacked.path), *open_paths(temp), *shared]
    sockets = unix_sockets(processes)
    assert len(files) > 20 and len(sockets) > 5
    pids = [process.pid for process in processes]
    assert as_another_account(lambda: intrusions(pids, files, sockets)) == []


class _Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, ...]:
        return (open, (self.path, "w"))


@pytest.mark.skipif(not shutil.which("ip"), reason="needs `ip` (iproute2) to lay a cable between two namespaces")
def test_another_machine_of_the_network_gets_nothing(tmp_path: Path, tiny_weights: Path) -> None:
    command = ["unshare", "-rn", sys.executable, "-m", "tests.support.network_attack", str(tmp_path / "home")]
    done = subprocess.run(
        [*command, str(tiny_weights)],
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
        cwd=REPO,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(REPO), os.environ.get("PYTHONPATH", "")])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    everywhere = [title for host, title in result["sockets"] if host not in (CLUSTER, "127.0.0.1")]
    assert everywhere and not [title for title in everywhere if re.search(r"llmrun: |VLLM|vllm", title)]  # Ray's alone
    assert result["taken"].pop("reached") > 15 and result["taken"] == {}
    assert result["status"] == 200 and result["dead"] == []


def test_no_port_unpickles_what_a_stranger_sends_to_ray_serve(listening: list[Listener], tmp_path: Path) -> None:
    request = ASGIRequest(pickled_request_metadata=pickle.dumps(_Touch(tmp_path / "touched")))

    def ask(each: Listener) -> grpc.StatusCode:
        with grpc.insecure_channel(f"{each.host}:{each.port}") as channel:
            call = channel.unary_unary(
                "/ray.serve.ASGIService/HandleRequest", request_serializer=ASGIRequest.SerializeToString
            )
            try:
                call(request, timeout=5)
            except grpc.RpcError as error:
                return error.code()
            return grpc.StatusCode.OK

    with ThreadPoolExecutor(16) as pool:
        codes = dict(zip(listening, pool.map(ask, listening), strict=True))
    assert not (tmp_path / "touched").exists()
    assert grpc.StatusCode.UNAUTHENTICATED in codes.values()  # the replica's server was among them
    assert grpc.StatusCode.OK not in codes.values(), codes


@contextlib.contextmanager
def documented_nginx(folder: Path, upstream: int) -> Iterator[str]:
    """Run nginx with the configuration of the documentation; yields its URL."""
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
    with nginx(folder, site):
        yield f"https://127.0.0.1:{port}"


def test_nginx_of_the_documentation_passes_streams_on_event_by_event(attacked: Home, tmp_path: Path) -> None:
    Authority.create(tmp_path).issue("gpu-box.example", tmp_path / "cert.pem", tmp_path / "key.pem")
    key = attacked.ok("key", "create", "proxied").split()[0]
    body = {"model": "target", "prompt": "Hi", "max_tokens": 400, "ignore_eos": True, "stream": True}
    try:
        with documented_nginx(tmp_path, attacked.port) as url, httpx.Client(verify=False, timeout=60) as client:
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
