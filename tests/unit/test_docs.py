"""What the documentation states is true."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from llmrun.settings import Settings
from llmrun.spec import ModelSpec
from llmrun_cli.app_files.python_file import load_app
from llmrun_runtime.engines.api import PORT, Engine, Launch, Member
from tests.support.cluster import BIN, REPO

DOCS = REPO / "docs"
README = (REPO / "README.md").read_text()
MAX_README_LINES = 100


def test_settings_are_documented() -> None:
    text = (DOCS / "reference/settings.md").read_text()
    for name, field in Settings.model_fields.items():
        assert f"`LLMRUN_{name.upper()}`" in text, name
        assert field.description and field.description in text, name


def test_the_readme_fits_on_a_few_screens() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


def test_the_readmes_app_can_be_loaded(tmp_path: Path) -> None:
    (text,) = re.findall(r"```python\n# app.py\n(.*?)```", README, re.S)
    (tmp_path / "app.py").write_text(text)
    models, _ = load_app(tmp_path / "app.py")
    assert [(item.spec.name, item.hooks) for item in models] == [("assistant", ()), ("writer", ("on_request",))]


@pytest.mark.parametrize(
    ("page", "names"),
    [
        ("deploy.md", ["assistant", "writer", "writer"]),
        ("weights.md", ["writer"]),
        ("adapters.md", ["base", "named", "configured"]),
    ],
)
def test_the_apps_of_the_how_to_pages_can_be_loaded(page: str, names: list[str], tmp_path: Path) -> None:
    loaded = []
    texts = re.findall(r"```python\n(from llmrun import.*?)```", (DOCS / "how-to" / page).read_text(), re.S)
    for number, text in enumerate(texts):
        path = tmp_path / str(number) / "app.py"
        path.parent.mkdir()
        path.write_text(text)
        loaded += [item.spec.name for item in load_app(path)[0]]
    assert loaded == names


def test_the_commands_in_the_docs_exist_and_every_command_is_in_the_reference() -> None:
    shown = subprocess.run([BIN / "llmrun", "--help"], capture_output=True, text=True, check=True).stdout
    existing = set(re.findall(r"^│ ([a-z]+)  ", shown, re.M))
    reference = (DOCS / "reference/cli.md").read_text()
    assert existing == set(re.findall(r"`llmrun ([a-z]+)", reference))
    pages = [README, *(path.read_text() for path in DOCS.rglob("*.md"))]
    blocks = [block for text in pages for block in re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)]
    commands = [text for language, text in blocks if language in ("", "sh", "bash")]
    named = {name for text in commands for name in re.findall(r"^llmrun ([a-z]+)", text, re.M)}
    named |= {name for text in pages for name in re.findall(r"`llmrun ([a-z]+)", text)}
    assert named <= existing


def test_the_engine_of_the_docs_implements_the_contract() -> None:
    (text,) = re.findall(
        r"```python\n(from llmrun_runtime.engines.api import.*?)```", (DOCS / "how-to/engines.md").read_text(), re.S
    )
    names: dict[str, Any] = {}
    exec(text.replace('package = "mine"', 'package = "json"'), names)
    engine: Engine = names["Mine"]()
    launch = Launch(("one",), "/w", (Member("n", "h"),), {"x": 1}, "python")
    assert engine.command(launch)[-6:] == ["mine-server", "/w", "--port", PORT, "--x", "1"]
    assert not engine.refuses(ModelSpec.model_validate({"name": "one", "model": "a/b"}))


def test_the_messages_that_troubleshooting_explains_are_in_the_source() -> None:
    table = (DOCS / "how-to/troubleshooting.md").read_text().partition("## llmrun's messages")[2].partition("\n## ")[0]
    messages = re.findall(r"^\| `(.+?)` \|", table, re.M)
    paths = [path for folder in ("decorators", "cli", "runtime") for path in (REPO / folder).rglob("*.py")]
    # Adjacent string literals are joined.
    source = re.sub(r'"\s+f?"', "", "\n".join(path.read_text() for path in paths))
    assert len(messages) > 10
    for message in messages:
        for part in message.split(" … "):
            assert part in source, message


def test_the_tree_of_the_architecture_page_is_the_real_one() -> None:
    (tree,) = re.findall(r"## The tree\n.*?```\n(.*?)```", (DOCS / "explanation/architecture.md").read_text(), re.S)
    parents: list[str] = []
    folders = set()
    for line in tree.splitlines():
        indent, name = re.findall(r"^( *)([\w./-]+/)(?: |$)", line)[0]
        parents = [*parents[: len(indent) // 2], name]
        folders.add("".join(parents).rstrip("/"))
    packages = {path.parent.relative_to(REPO).as_posix() for path in (REPO / "runtime").rglob("__init__.py")}
    missing = {f for f in packages if f not in folders and not f.endswith(("/routers",))}
    assert not missing, "folders that are not in the tree"
    assert not [folder for folder in folders if not (REPO / folder).is_dir()]


def test_ci_runs_the_readmes_test_command() -> None:
    commands = re.findall(r"^(pip install rust-just && just \w+)", README, re.M)
    assert len(commands) == 2
    assert commands[1] in (REPO / ".ci" / "run").read_text()


def test_every_just_recipe_that_the_docs_name_exists() -> None:
    recipes = set(re.findall(r"^([a-z][a-z0-9-]*)(?: [^:\n]*)?:(?!=)", (REPO / "justfile").read_text(), re.M))
    pages = [README, (REPO / "CONTRIBUTING.md").read_text(), *(path.read_text() for path in DOCS.rglob("*.md"))]
    named = {
        name for text in pages for name in re.findall(r"`(?:time )?(?:.*?&& )?just ([a-z0-9-]+)(?![a-z0-9…-])", text)
    }
    assert named and named <= recipes


def test_the_files_that_the_docs_name_exist() -> None:
    pages = [path for path in DOCS.rglob("*.md") if "/." not in path.as_posix()]
    named = {name for path in pages for name in re.findall(r"`((?:examples|tests)/[\w./-]+)`", path.read_text())}
    assert named and not [name for name in named if not (REPO / name).exists()]


def test_links_between_pages_lead_to_files() -> None:
    """`just docs` checks anchors, too, but no links out of the folder `docs`: on the site they would lead nowhere."""
    roots = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")]
    pages = [path for path in DOCS.rglob("*.md") if "/." not in path.as_posix()]
    for page in roots + pages:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            path = (page.parent / target).resolve()
            assert path.is_file(), f"{page.name}: {target}"
            assert page in roots or path.is_relative_to(DOCS), f"{page.name}: {target}"
