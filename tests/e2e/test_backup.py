"""A cluster is backed up while it runs, and restored on another machine: here, in another home."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.cluster import Home, free_port, until, write_app
from tests.support.stub_engine import install

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]


def test_a_cluster_moves_to_an_empty_home(tmp_path: Path) -> None:
    env = install(tmp_path / "packages") | {"LLMRUN_FORKSERVER": "0"}
    old, new = Home(tmp_path / "old", free_port(), env), Home(tmp_path / "new", free_port(), env)
    archive = tmp_path / "backup.zip"
    (weights := tmp_path / "weights").mkdir()
    (weights / "config.json").write_text("{}")
    hook = "    def on_request(self, request): return request\n"
    text = f"@llm({str(weights)!r}, engine='stub', cpus=0.2, idle_timeout=600)\nclass Moved:\n{hook}"

    def requests(home: Home) -> dict[str, int]:
        rows = json.loads(home.ok("usage", "--by", "key", "--json"))
        return {row["key"]: row["requests"] for row in rows}

    old.ok("up")
    try:
        old.ok("deploy", write_app(tmp_path / "moved" / "app.py", text))
        key = old.run("key", "create", "alice", "--rpm", "50").stdout.strip()
        headers = {"authorization": f"Bearer {key}"}
        until(lambda: old.ask("moved", headers=headers).status_code == 200, 10, "the key works")
        until(lambda: requests(old).get("alice") == 1, 10, "the request is counted")
        assert "Backed up 1 model and 1 API key" in old.ok("backup", archive)
        assert "a cluster runs in" in old.fails("restore", archive, "--force")
        keys = old.ok("key", "list", "--json")
    finally:
        old.ok("down")
    new.ok("restore", archive)
    new.ok("up")
    try:
        assert new.status("moved")["version"] == 1
        assert new.ok("key", "list", "--json") == keys
        assert requests(new)["alice"] == 1
        assert new.ask("moved").status_code == 401
        answer = new.ask("moved", headers=headers)
        assert answer.status_code == 200, answer.text
        until(lambda: requests(new)["alice"] == 2, 10, "usage continues")
        assert new.starts("moved")
    finally:
        new.ok("down")
