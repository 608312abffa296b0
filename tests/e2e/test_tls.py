"""A cluster with a certificate: commands, clients, a restart, and a proxy in front of it."""

from __future__ import annotations

import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support.certificates import Authority
from tests.support.cluster import Home, free_port

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(200)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tls")


@pytest.fixture(scope="module")
def authority(folder: Path) -> Authority:
    return Authority.create(folder)


@pytest.fixture(scope="module")
def secure(folder: Path, authority: Authority) -> Iterator[Home]:
    """A cluster whose certificate is for a name that this machine does not have."""
    home = Home(folder / "home", free_port(), {"LLMRUN_URL": "", "LLMRUN_FORKSERVER": "0"})
    authority.issue("gpu.example", folder / "cert.pem", folder / "key.pem")
    options = ("--port", str(home.port), "--tls-cert", folder / "cert.pem", "--tls-key", folder / "key.pem")
    assert f"https://127.0.0.1:{home.port}" in home.ok("up", *options)
    try:
        yield home
    finally:
        home.ok("down")


def health(home: Home, authority: Authority) -> httpx.Response:
    """Ask as a client that trusts the authority, and knows the name."""
    context = ssl.create_default_context(cafile=str(authority.file))
    with httpx.Client(verify=context) as client:
        return client.get(
            f"https://127.0.0.1:{home.port}/health",
            headers={"host": "gpu.example"},
            extensions={"sni_hostname": "gpu.example"},
        )


def test_commands_of_the_home_trust_its_certificate(secure: Home) -> None:
    assert "No models" in secure.ok("status")
    assert secure.ok("key", "list")


def test_clients_that_trust_the_authority_are_served_and_others_are_not(secure: Home, authority: Authority) -> None:
    assert health(secure, authority).json()["status"] == "ok"
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        httpx.get(f"https://127.0.0.1:{secure.port}/health")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://127.0.0.1:{secure.port}/health")


def test_a_command_elsewhere_needs_the_authority(secure: Home, authority: Authority, folder: Path) -> None:
    key = (secure.path / "admin.key").read_text()
    elsewhere = Home(folder / "elsewhere", secure.port)
    env = {"LLMRUN_URL": f"https://127.0.0.1:{secure.port}", "LLMRUN_ADMIN_KEY": key}
    error = elsewhere.fails("status", **env)
    assert "its certificate is not trusted" in error and "LLMRUN_CA_FILE" in error
    error = elsewhere.fails("status", **env, LLMRUN_CA_FILE=str(authority.file))
    assert "127.0.0.1" in error and "its certificate is not trusted" in error  # the name is checked, too


def test_changes_are_in_the_audit_log(secure: Home) -> None:
    secure.ok("key", "create", "ci")
    secure.ok("key", "revoke", "ci")
    assert "not found" in secure.fails("key", "revoke", "ci")
    shown = secure.ok("audit", "--tail", "3").splitlines()
    assert [line.split("127.0.0.1")[1].split() for line in shown[1:]] == [
        ["POST", "/keys", "ci", "200"],
        ["DELETE", "/keys/ci", "-", "200"],
        ["DELETE", "/keys/ci", "-", "404"],
    ]
    assert all("@" in line and "admin" in line for line in shown[1:])


def test_a_restart_keeps_the_certificate(secure: Home, authority: Authority) -> None:
    assert "https://" in secure.ok("restart")
    assert health(secure, authority).status_code == 200
    assert "No models" in secure.ok("status")


def test_the_admin_api_is_not_served_through_a_proxy(secure: Home) -> None:
    key = (secure.path / "admin.key").read_text()
    headers = {"authorization": f"Bearer {key}", "x-forwarded-for": "203.0.113.9"}
    with httpx.Client(verify=False) as client:
        answer = client.get(f"https://127.0.0.1:{secure.port}/llmrun/v1/status", headers=headers)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "admin_not_here"
