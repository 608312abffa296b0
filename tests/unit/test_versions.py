"""A command line and a cluster of different releases."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

import llmrun
from llmrun.errors import ControlError
from llmrun.settings import Settings
from llmrun.wire import ADMIN, CONTROL_ROOT, VERSION_HEADER, Event, KeyInfo
from llmrun_cli import deploy_output
from llmrun_cli.client import Client, to_error
from llmrun_cli.commands import models
from llmrun_runtime.control.api.app import make_api
from llmrun_runtime.control.audit import AuditLog

HINT = f"This llmrun is 9.9, the cluster runs {llmrun.__version__}: install llmrun=={llmrun.__version__} here"


def answering(content: Any, version: str) -> Client:
    """Return a client of a cluster of that version, which answers every request with `content`."""
    client = Client(Settings(url="https://cluster", admin_key="k"))
    headers = dict(client._http.headers)
    assert headers[VERSION_HEADER] == llmrun.__version__

    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, json=content, headers={VERSION_HEADER: version})

    client._http = httpx.Client(base_url="https://cluster", headers=headers, transport=httpx.MockTransport(respond))
    return client


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "words"),
    [
        ("GET", "/later", None, 404, "/llmrun/v1/later is unknown to the cluster"),
        ("POST", "/keys", {"name": "ci", "later": 1}, 422, "body.later: Extra inputs are not permitted"),
    ],
)
async def test_a_request_that_another_release_does_not_know(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, method: str, path: str, body: Any, status: int, words: str
) -> None:
    plane: Any = SimpleNamespace(keys=SimpleNamespace(find=lambda secret, now: ADMIN), audit=AuditLog(tmp_path))
    async with httpx.AsyncClient(
        transport=httpx.ASGITransport(make_api(plane)),
        base_url="https://cluster",
        headers={"authorization": "Bearer k"},
    ) as client:
        response = await client.request(method, CONTROL_ROOT + path, json=body)
    plane.audit.close()
    same = to_error(response)
    assert same.status == status and str(same) == words
    monkeypatch.setattr(llmrun, "__version__", "9.9")
    assert str(to_error(response)) == f"{words}. {HINT}, or upgrade the cluster"


def test_states_and_kinds_of_a_later_release_are_shown(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = {
        **{"name": "one", "app": "a", "state": "hibernating", "version": 1, "proven": True, "replicas": 0},
        **{"in_flight": 0, "waiting": 0, "model": "org/one", "pin": "", "aliases": [], "placement": "", "cause": ""},
        "details": [
            {"id": "r", "version": 1, "state": "paused", "node": "n", "address": "", "in_flight": 0, "later": 1}
        ],
    }
    client = answering({"url": "https://cluster", "models": [model]}, "9.9")
    monkeypatch.setattr(models, "Client", lambda settings: client)
    models.status()
    assert "hibernating" in capsys.readouterr().out
    status = client.status()
    assert (status.models[0].state, status.models[0].details[0].state) == ("hibernating", "paused")
    (key,) = answering([{"name": "ci", "priority": "urgent", "later": 1}], "9.9").keys()
    assert key.priority == "urgent"
    with pytest.raises(ValueError, match="priority"):
        KeyInfo.model_validate({"name": "ci", "priority": "urgent"})
    plan = {"app": "a", "fingerprint": "f", "changes": [{"model": "one", "kind": "move"}]}
    request: Any = SimpleNamespace(model_dump=lambda mode: {})
    deploy_output.show_plan(answering(plan, "9.9").plan(request))
    assert Event.model_validate({"kind": "paused", "model": "one"}).kind == "paused"


def test_an_answer_that_cannot_be_read_names_both_versions() -> None:
    with pytest.raises(ControlError) as error:
        answering({"url": "https://cluster"}, "9.9").status()
    assert str(error.value) == (
        f"cannot read the cluster's answer: Status: models: Field required. This llmrun is {llmrun.__version__}, "
        f"the cluster runs 9.9: install llmrun==9.9 here, or upgrade the cluster"
    )
