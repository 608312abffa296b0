"""The documentation says what is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_cli.app_files.python_file import load_app
from llmrun_runtime.engines.api import PORT, Engine, Launch, Member
from tests.support.cluster import BIN, REPO

README = (REPO / "README.md").read_text()


def test_settings_are_documented() -> None:
    text = (REPO / "docs" / "reference" / "settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"`LLMRUN_{name.upper()}`" in text, name
        assert field.description and field.description in text, name


def test_the_readmes_app_can_be_loaded(tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n# app.py\n(.*?)```", README, re.S)
    (tmp_path / "app.py").write_text(text)
    models = load_app(tmp_path / "app.py")
    assert [(item.spec.name, item.hooks) for item in models] == [
        ("assistant", ()),
        ("writer", ("on_start", "on_request")),
    ]


def test_the_readmes_commands_exist_and_every_command_is_there() -> None:
    shown = subprocess.run([BIN / "llmrun", "--help"], capture_output=True, text=True, check=True).stdout
    real = set(re.findall(r"^│ ([a-z]+)  ", shown, re.M))
    told = set(re.findall(r"`llmrun ([a-z]+)", README))
    assert real == told


def test_the_engine_of_the_docs_keeps_to_the_contract() -> None:
    (text,) = re.findall(
        r"```python\n(from llmrun_runtime.engines.api import.*?)```", (REPO / "docs/engines.md").read_text(), re.S
    )
    names: dict[str, Any] = {}
    exec(text.replace('package = "mine"', 'package = "json"'), names)
    engine: Engine = names["Mine"]()
    launch = Launch(("one",), "/w", (Member("n", "h"),), {"x": 1}, "python")
    assert engine.command(launch)[-6:] == ["mine-server", "/w", "--port", PORT, "--x", "1"]
    assert not engine.refuses(ModelSpec.model_validate({"name": "one", "model": "a/b"}))


def test_the_messages_that_troubleshooting_explains_are_said() -> None:
    table = (REPO / "docs/troubleshooting.md").read_text().partition("## What llmrun says")[2]
    messages = re.findall(r"^\| `(.+?)` \|", table, re.M)
    rooms = [path for room in ("decorators", "cli", "runtime") for path in (REPO / room).rglob("*.py")]
    # What is put together of several strings in the source, as one.
    source = re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in rooms))
    assert len(messages) > 10
    for message in messages:
        for part in message.split(" … "):
            assert part in source, message


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^(pip install rust-just && just \w+)", README, re.M)
    assert len(commands) == 2
    assert commands[1] in (REPO / ".ci" / "run").read_text()


def test_every_just_recipe_that_the_docs_name_exists() -> None:
    recipes = set(re.findall(r"^([a-z][a-z0-9-]*)[^:=\n]*:(?!=)", (REPO / "justfile").read_text(), re.M))
    texts = [README, *(path.read_text() for path in (REPO / "docs").glob("*.md"))]
    named = {name for text in texts for name in re.findall(r"`(?:time )?(?:.*?&& )?just ([a-z0-9-]+)", text)}
    assert named and named <= recipes
