"""App files as people write them: in packages, with links and data, in loops; and what fails at the first deploy."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.adapters import make_adapter
from tests.support.cluster import Home, titled, until, write_app

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]


def test_an_app_runs_as_python_would_run_it(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    """It has helpers in a folder, a linked package, data beside the file, and a loop."""
    folder = tmp_path / "project" / "pkg"
    (folder / "helpers").mkdir(parents=True)
    (folder / "helpers" / "util.py").write_text("def words(text: str) -> int:\n    return len(text.split())\n")
    (folder / "src" / "shared").mkdir(parents=True)
    (folder / "src" / "shared" / "__init__.py").write_text("MORE = 2\n")
    (folder / "shared").symlink_to("src/shared")
    (folder / "data.txt").write_text("one two three")
    text = f"""
from pathlib import Path

from helpers.util import words
from shared import MORE

DATA = (Path(__file__).parent / "data.txt").read_text()
for extra in range(2):
    @llm({str(tiny_weights)!r}, name=f"loop{{extra}}", cpus=0.2)
    class Loop:
        extra = extra

        def on_request(self, request: dict) -> dict:
            return request | {{"max_tokens": words(DATA) + MORE + self.extra, "ignore_eos": True}}
"""
    app = write_app(folder / "app.py", text)
    planned = cluster.ok("deploy", app, "--dry-run")
    assert "+ loop0" in planned and "+ loop1" in planned
    (folder / "json.py").write_text("")
    done = cluster.run("deploy", f"{app}::loop1")
    assert done.returncode == 0 and "json.py has the name of a module of Python's library" in done.stderr, done.stderr
    try:
        answer = cluster.ask("loop1")
        assert answer.json()["usage"]["completion_tokens"] == 3 + 2 + 1, answer.text
    finally:
        cluster.ok("delete", "--app", "pkg", "--yes")


def test_a_model_that_failed_at_its_first_deploy(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    """It is still known when control has been killed, and can be deleted with its app."""
    text = f"@llm({str(tiny_weights)!r}, cpus=0.2, engine_args={{'max_model_len': 10**7}})\nclass Never: ...\n"
    error = cluster.fails("deploy", write_app(tmp_path / "never" / "app.py", text))
    assert "max_model_len (10000000) is greater" in error
    before = cluster.status("never")
    assert before["state"] == "failed" and "max_model_len" in before["cause"]
    (control,) = titled(cluster, "ray::Control")
    control.kill()

    def known() -> bool:
        done = cluster.run("status", "never", "--json")
        return done.returncode == 0 and "max_model_len" in done.stdout

    until(known, 60, "the new control knows why it failed")
    assert cluster.status("never")["state"] == "failed"
    assert "Deleted never" in cluster.ok("delete", "--app", "never", "--yes")
    assert "model 'never' not found" in cluster.fails("status", "never")


def test_folders_that_look_like_adapters_are_named(cluster: Home, tmp_path: Path, tiny_weights: Path) -> None:
    adapters = tmp_path / "odd" / "adapters"
    for name in ("good", "a b", "über", "team/nested"):
        make_adapter(adapters / name, seed=1)
    text = f"@llm({str(tiny_weights)!r}, cpus=0.2, lora='./adapters')\nclass Odd: ...\n"
    done = cluster.run("deploy", write_app(tmp_path / "odd" / "app.py", text), "--lazy")
    assert done.returncode == 0, done.stderr
    try:
        shown = " ".join(done.stderr.split())
        assert "left out of the adapters" in shown and "'a b': its name must be letters" in shown
        assert "'team/nested': it is nested" in shown and "'über'" in shown and "'good'" not in shown
        listed = cluster.run("adapter", "list", "odd")
        assert "odd:good" in listed.stdout and "odd:a b" not in listed.stdout
        assert "'a b' is left out: its name must be" in " ".join(listed.stderr.split())
    finally:
        cluster.ok("delete", "odd", "--yes")
