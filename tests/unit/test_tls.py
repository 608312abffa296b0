"""The ingress's certificate, and what commands trust; from where the admin API can be reached."""

from __future__ import annotations

import argparse
import asyncio
import json
import ssl
from pathlib import Path
from typing import Any

import httpx
import pytest

from llmrun.errors import ClusterError, ControlError
from llmrun.settings import Settings
from llmrun_cli.credentials import trusted
from llmrun_runtime import http
from llmrun_runtime.asgi import Receive, Scope, Send, send_json
from llmrun_runtime.ingress.admission.admin_access import check_admin_access
from llmrun_runtime.ingress.errors import HTTPError
from llmrun_runtime.listening import Listening
from tests.support.certificates import Authority


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority.create(tmp_path)


@pytest.fixture
def files(tmp_path: Path, authority: Authority) -> tuple[str, str]:
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    authority.issue("gpu.example", cert, key)
    return str(cert), str(key)


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send_json(send, 200, {"scheme": scope["scheme"]})


async def served(port: int, ca: Path, name: str) -> bytes:
    """Return the certificate that a server presents for a name."""
    context = ssl.create_default_context(cafile=str(ca))
    _, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context, server_hostname=name)
    certificate = writer.get_extra_info("ssl_object").getpeercert(binary_form=True)
    writer.close()
    assert certificate
    return bytes(certificate)


async def test_a_renewed_certificate_is_presented_and_a_broken_one_is_not(
    tmp_path: Path, authority: Authority, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(http, "CERTIFICATE_CHECK_S", 0.05)
    listening = Listening(tls_cert=files[0], tls_key=files[1])
    sock = http.bind("127.0.0.1", 0)
    port = sock.getsockname()[1]
    serving = asyncio.create_task(http.HTTPServer(app, listening).serve([sock]))
    try:
        first = await served(port, authority.file, "gpu.example")
        context = ssl.create_default_context(cafile=str(authority.file))
        context.check_hostname = False
        async with httpx.AsyncClient(verify=context) as client:
            assert (await client.get(f"https://127.0.0.1:{port}/")).json() == {"scheme": "https"}
        Path(files[0]).write_text("broken")
        await asyncio.sleep(0.2)
        assert await served(port, authority.file, "gpu.example") == first
        renewed = authority.issue("gpu.example", Path(files[0]), Path(files[1]))
        async with asyncio.timeout(5):
            while await served(port, authority.file, "gpu.example") != renewed:
                await asyncio.sleep(0.05)
    finally:
        serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)


def test_a_certificate_that_cannot_be_used_is_refused_before_the_start(
    tmp_path: Path, authority: Authority, files: tuple[str, str]
) -> None:
    other = tmp_path / "other-key.pem"
    authority.issue("other.example", tmp_path / "other.pem", other)
    broken = tmp_path / "broken.pem"
    broken.write_text("x")
    for cert, key, cause in (
        (str(tmp_path / "none.pem"), "", "no such file or directory"),
        (str(broken), "", "(pem lib|not in pem format)"),
        (files[0], str(other), "key values mismatch"),
    ):
        with pytest.raises(ClusterError, match=rf"cannot use the certificate {cert}.*: {cause}\. Both files must"):
            Listening(tls_cert=cert, tls_key=key).tls()
    with pytest.raises(ClusterError, match="set --tls-cert, too"):
        Listening(tls_key=files[1]).tls()


def test_options_of_up_reach_the_ingress() -> None:
    parser = argparse.ArgumentParser()
    Listening.add_arguments(parser)
    for listening in (
        Listening(),
        Listening("::", 1, insecure=True, admin_host="10.0.0.1", tls_cert="/c", tls_key="/k"),
    ):
        assert Listening.of(parser.parse_args(listening.arguments())) == listening
    assert Listening("0.0.0.0", 8443, tls_cert="/c").url == "https://127.0.0.1:8443"
    assert Listening("fd00::1", 80).url == "http://[fd00::1]:80"


def test_commands_trust_the_certificate_of_their_own_cluster_and_no_other(
    tmp_path: Path, authority: Authority, files: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMRUN_HOME", str(tmp_path))
    own = "https://127.0.0.1:8443"
    (tmp_path / "cluster.json").write_text(json.dumps({"url": own, "tls_cert": files[0]}))
    context = trusted(Settings())
    assert isinstance(context, ssl.SSLContext) and not context.check_hostname and len(context.get_ca_certs()) == 0
    assert context.verify_mode == ssl.CERT_REQUIRED and context.cert_store_stats()["x509"] == 1
    assert trusted(Settings(url="https://other.example")) is True
    assert trusted(Settings(url="http://127.0.0.1:8443")) is True
    named = trusted(Settings(url="https://other.example", ca_file=str(authority.file)))
    assert isinstance(named, ssl.SSLContext) and named.check_hostname and len(named.get_ca_certs()) == 1
    with pytest.raises(ControlError, match=r"cannot read LLMRUN_CA_FILE /none: No such file.*must be a PEM file"):
        trusted(Settings(url=own, ca_file="/none"))


def access(client: str, server: str, admin_host: str = "", headers: Any = ()) -> bool:
    """Whether a request over such a connection reaches the admin API."""
    scope = {"client": (client, 1) if client else None, "server": (server, 2), "headers": headers}
    try:
        check_admin_access(scope, admin_host)
    except HTTPError as error:
        assert error.status == 403 and "--admin-host" in error.message
        return False
    return True


def test_the_admin_api_is_for_this_machine_unless_opened() -> None:
    assert access("127.0.0.1", "127.0.0.1") and access("::1", "::1") and access("::ffff:127.0.0.1", "::ffff:127.0.0.1")
    assert access("10.0.0.5", "10.0.0.5")  # of this machine, by its own address
    assert not access("10.0.0.9", "10.0.0.5") and not access("", "10.0.0.5") and not access("x", "10.0.0.5")
    for header in (b"x-forwarded-for", b"forwarded", b"via", b"x-real-ip"):
        assert not access("127.0.0.1", "127.0.0.1", headers=[(header, b"10.0.0.9")])
    assert access("10.0.0.9", "10.0.0.5", "10.0.0.5") and not access("10.0.0.9", "10.0.0.5", "10.0.0.6")
    assert access("10.0.0.9", "10.0.0.5", "0.0.0.0") and access("127.0.0.1", "127.0.0.1", "::", [(b"via", b"x")])
