"""The audit log: what is recorded, how it is read, and what happens when it cannot be written."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from llmrun.errors import Refused
from llmrun.wire import ADMIN, BY_HEADER, CONTROL_ROOT, AuditRow, KeyInfo, NewKey
from llmrun_runtime.control import audit as audit_module
from llmrun_runtime.control.api.app import make_api
from llmrun_runtime.control.audit import AuditLog
from llmrun_runtime.wire.headers import CLIENT_HEADER


def row(number: int) -> AuditRow:
    """A row with a number as its time."""
    return AuditRow(at=number, who="admin", action="DELETE /models/one", status=200)


class _Keys:
    def create(self, info: Any) -> NewKey:
        return NewKey(key="sk-llmrun-secret", facts=info)

    def find(self, secret: str, now: float) -> KeyInfo | None:
        return ADMIN if secret == "k" else None

    def revoke(self, name: str) -> None:
        raise Refused(f"key {name!r} not found", 404)


async def _run(function: Any, *args: Any) -> Any:
    return function(*args)


@pytest.fixture
def audit(tmp_path: Path) -> Iterator[AuditLog]:
    audit = AuditLog(tmp_path)
    yield audit
    audit.close()


@pytest.fixture
def plane(audit: AuditLog) -> Any:
    autoscaler = SimpleNamespace(wait_until_keys_are_routed=partial(_run, list))
    adapters = SimpleNamespace(check_names=lambda names: None)
    database = SimpleNamespace(run=_run)
    return SimpleNamespace(audit=audit, keys=_Keys(), autoscaler=autoscaler, adapters=adapters, database=database)


async def test_changes_are_recorded_with_who_and_what_and_their_result(plane: Any, tmp_path: Path) -> None:
    headers = {
        "authorization": "Bearer k",
        BY_HEADER: "alice@laptop",
        CLIENT_HEADER: "10.0.0.9",
        "x-request-id": "r1",
    }
    transport = httpx.ASGITransport(make_api(plane))
    async with httpx.AsyncClient(transport=transport, base_url=f"https://cluster{CONTROL_ROOT}") as client:
        assert (await client.post("/keys", json={"name": "ci"}, headers=headers)).status_code == 200
        assert (await client.delete("/keys/none", headers=headers)).status_code == 404
        assert (
            await client.post("/keys", json={"name": "x"}, headers={"authorization": "Bearer no"})
        ).status_code == 401
        rows = [AuditRow.model_validate(each) for each in (await client.get("/audit", headers=headers)).json()]
    assert [(each.action, each.subject, each.status) for each in rows] == [
        ("POST /keys", "ci", 200),
        ("DELETE /keys/none", "", 404),
    ]
    assert {(each.who, each.by, each.client, each.request) for each in rows} == {
        ("admin", "alice@laptop", "10.0.0.9", "r1")
    }
    text = (tmp_path / "logs/audit.log").read_text()
    assert "secret" not in text and len(text.splitlines()) == 2


def test_the_last_rows_are_read_across_files_and_a_cut_line_is_left_out(
    tmp_path: Path, audit: AuditLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_module, "LOG_BYTES", 300)
    assert audit.tail(5) == []
    for number in range(20):
        audit.write(row(number))
    with (tmp_path / "logs/audit.log").open("a") as file:
        file.write('{"at": 1')
    assert [each.at for each in audit.tail(7)] == [13, 14, 15, 16, 17, 18, 19]
    assert len(list((tmp_path / "logs").glob("audit.log-*"))) > 3


def test_a_change_that_cannot_be_recorded_is_in_controls_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "logs").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        AuditLog(tmp_path).write(row(1))
    assert "Not recorded: " in caplog.text and "DELETE /models/one" in caplog.text


def test_lines_are_json_and_cannot_be_forged(tmp_path: Path, audit: AuditLog) -> None:
    audit.write(row(1).model_copy(update={"by": 'x"}\n{"at": 2, "who": "admin"'}))
    (line,) = (tmp_path / "logs/audit.log").read_text().splitlines()
    assert json.loads(line)["at"] == 1 and len(audit.tail(9)) == 1
