"""The command line without a cluster: app files, code packages and error messages."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import cast

import pytest
import typer

from llmrun.app_file import load_file
from llmrun.decorator import spec_of
from llmrun.errors import AppError, DeployError, HookError
from llmrun.wire import Event
from llmrun_cli import deployment
from llmrun_cli.app_files.package import CodePackage, hidden_modules, pack
from llmrun_cli.app_files.python_file import load_app
from llmrun_cli.client import Client
from llmrun_cli.deploy_output import show_code, show_events
from llmrun_cli.terminal import exit_on_interrupt
from tests.support.cluster import Home, until, write_app
from tests.support.reference import commands


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class A: ...", ["no models found", "Put @llm on a class", '@llm("Qwen']),
        ("class A:\n  pass\n)", ["app.py: syntax error", "line 5"]),
        ('@llm("a/b")\nclass A: ...\n@llm("a/b")\nclass a: ...', ["duplicate model name 'a' (A and a)", "Set name="]),
        ('@llm("a/b", min_replica=1)\nclass A: ...', ["app.py:3: ", "did you mean min_replicas="]),
        ("import os\nos._exit(3)", ["Python exited with code 3"]),
    ],
)
def test_invalid_app_files_are_reported(home: Home, tmp_path: Path, text: str, words: list[str]) -> None:
    error = home.fails("deploy", write_app(tmp_path / "app.py", text))
    for word in words:
        assert word in error
    assert "Traceback" not in error


def test_a_file_that_raises_shows_the_users_own_traceback(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", "def inner():\n    raise RuntimeError('boom')\n\ninner()\n")
    error = home.fails("deploy", app)
    assert "import failed: RuntimeError: boom" in error
    frames = [line for line in error.splitlines() if line.startswith("  File ")]
    assert [frame.split(", ")[1] for frame in frames] == ["line 6", "line 4"]
    assert all("app.py" in frame for frame in frames)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.py"], "missing.py: file not found"),
        (["./missing.py::A"], "missing.py: file not found"),
        (["nonsense"], "nonsense: file not found, and not a model name like org/model"),
        (["org/model", "--accelerator", "A10G:0"], "'A10G:2'"),
        (["org/model", "--", "8192"], "flags start with '--'"),
    ],
)
def test_invalid_targets_are_reported(home: Home, arguments: list[str], words: str) -> None:
    assert words in home.fails("deploy", *arguments)


def test_an_unknown_model_in_the_file_is_reported(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", '@llm("a/b")\nclass Assistant: ...\n')
    error = home.fails("deploy", f"{app}::Asistant")
    assert "model 'Asistant' not found" in error and "available: Assistant (assistant)" in error


def test_commands_without_a_cluster_name_its_address(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", '@llm("a/b")\nclass A: ...\n')
    for command in (["status"], ["deploy", str(app)], ["delete", "a", "--yes"], ["logs", "a"], ["chat", "a", "Hi"]):
        error = home.fails(*command)
        assert home.url in error and "llmrun up" in error
    assert "LLMRUN_URL" in home.fails("status", LLMRUN_URL="nonsense://x")


def is_listening(port: int) -> bool:
    """Whether a server accepts connections at the port."""
    with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


def test_a_port_that_another_server_uses_is_reported(home: Home) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(home.port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: is_listening(home.port), 10, "the other server listens")
        assert "is not an llmrun endpoint" in home.fails("status")
        error = home.fails("up")
        assert f"cannot listen on 127.0.0.1:{home.port}" in error and "--port" in error
    finally:
        server.terminate()
        server.wait(10)


def test_paths_are_relative_to_the_app_file(tmp_path: Path) -> None:
    app = write_app(tmp_path / "apps" / "app.py", '@llm("./weights")\nclass A: ...\n@llm("~/w")\nclass B: ...\n')
    assert [str(item.spec.model) for item in load_app(app)[0]] == [str(tmp_path / "apps" / "weights"), "~/w"]


def test_an_app_file_may_import_its_neighbours_and_print(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'from-neighbour'\n")
    text = "from neighbour import NAME\nprint('loading')\n@llm('a/b', name=NAME)\nclass A: ...\n"
    assert load_app(write_app(tmp_path / "app.py", text))[0][0].spec.name == "from-neighbour"
    assert capfd.readouterr().out == ""


LOOP = "for i in range(2):\n    @llm('a/b', name=f'l{i}')\n    class L: ...\n"


def test_models_that_share_a_class_name_are_all_deployed(tmp_path: Path) -> None:
    models, warnings = load_app(write_app(tmp_path / "app.py", LOOP))
    assert [model.spec.name for model in models] == ["l0", "l1"] and not warnings
    loaded = load_file(tmp_path / "app.py")
    for model in ("l0", "l1"):
        assert (spec := spec_of(loaded.find(model, "L"))) and spec.name == model
    with pytest.raises(HookError, match="several classes are named L, and none is model 'renamed' on this node"):
        loaded.find("renamed", "L")
    with pytest.raises(HookError, match="app has no class M on this node"):
        loaded.find("renamed", "M")


def test_the_models_of_other_files_are_deployed_if_they_are_imported_by_name(tmp_path: Path) -> None:
    text = "from llmrun import llm\n@llm('a/b')\nclass One: ...\n@llm('a/b')\nclass Two: ...\n"
    (tmp_path / "others.py").write_text(text)
    app = write_app(tmp_path / "app.py", "import others\nfrom others import Two\n@llm('a/b')\nclass Three: ...\n")
    models, warnings = load_app(app)
    assert [model.spec.name for model in models] == ["two", "three"]
    (warning,) = warnings
    assert "model 'one' is not deployed: its class is defined in others. Import the class One by its name" in warning


def test_a_class_that_another_decorator_copies_is_one_model(tmp_path: Path) -> None:
    text = "import dataclasses\n@dataclasses.dataclass(slots=True)\n@llm('a/b')\nclass A:\n    x: int = 1\n"
    models, _ = load_app(write_app(tmp_path / "app.py", text))
    assert [model.spec.name for model in models] == ["a"]


def test_a_file_that_python_cannot_read_is_refused(tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", "@llm('a/b')\nclass A: ...\n")
    text = app.read_bytes()
    app.write_bytes(text + b"# \xe9\n")
    with pytest.raises(AppError) as error:
        load_app(app)
    assert "syntax error" in str(error.value) and "save the file as UTF-8" in str(error.value.detail)
    app.write_bytes(b"# -*- coding: latin-1 -*-\n" + text + b"# \xe9\n")
    assert load_app(app)[0][0].spec.name == "a"


def test_modules_that_hide_others_are_named(tmp_path: Path) -> None:
    for name in ("app.py", "json.py", "torch.py", "helpers/types.py", "data.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    first, second = hidden_modules(pack(tmp_path))
    assert first.startswith("json.py has the name of a module of Python's library") and second.startswith("torch.py")


def test_links_to_folders_inside_are_packed(tmp_path: Path) -> None:
    (tmp_path / "lib" / "shared").mkdir(parents=True)
    (tmp_path / "lib" / "shared" / "util.py").write_text("x = 1")
    (tmp_path / "app.py").write_text("import shared.util")
    (tmp_path / "shared").symlink_to("lib/shared")
    assert pack(tmp_path).files == ("app.py", "lib/shared/util.py", "shared/util.py")
    (tmp_path / "lib" / "loop").symlink_to("..")
    with pytest.raises(AppError, match=r"lib/loop: the link leads to a folder that contains it"):
        pack(tmp_path)
    (tmp_path / "lib" / "loop").unlink()
    (tmp_path / "lib" / "other").symlink_to("../elsewhere")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to("../lib")
    with pytest.raises(AppError, match=r"back/other: the link leads to a folder that contains it"):
        pack(tmp_path)


def test_links_take_nothing_along_that_is_left_out(tmp_path: Path) -> None:
    for name in ("app.py", "private/conf/x.py", "models/llama/w.safetensors", "state/admin.key", "state/logs/l.log"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "models" / "latest").symlink_to("llama")
    (tmp_path / "logs").symlink_to("state/logs")
    package = pack(tmp_path, exclude=[tmp_path / "models" / "llama"])
    assert package.files == ("app.py", "private/conf/x.py") and set(package.secrets) == {"logs/", "state/"}
    (tmp_path / ".llmrunignore").write_text("/private/\n")
    (tmp_path / "conf").symlink_to("private/conf")
    with pytest.raises(AppError, match=r"conf: the link leads to .*private/conf, which an ignore file leaves out"):
        pack(tmp_path, exclude=[tmp_path / "models"])


def test_packages_are_the_same_for_the_same_files(tmp_path: Path) -> None:
    packages: list[CodePackage] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        for name in ("app.py", "sub/helper.py", "sub/deep.txt", "skip/x.py", "__pycache__/app.pyc", "weights/w.bin"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (folder / ".gitignore").write_text("skip/\n")
        (folder / "sub" / ".llmrunignore").write_text("*.txt\n")
        os.utime(folder / "app.py", (len(packages), len(packages)))
        packages.append(pack(folder, exclude=[folder / "weights"]))
    assert packages[0] == packages[1]
    with zipfile.ZipFile(BytesIO(packages[0].data)) as package:
        assert package.namelist() == [".gitignore", "app.py", "sub/.llmrunignore", "sub/helper.py"]
    assert packages[0].files == (".gitignore", "app.py", "sub/.llmrunignore", "sub/helper.py")


def test_a_package_contains_no_secrets_and_no_home(tmp_path: Path) -> None:
    secrets = [".env", "config/.env.production", ".aws/credentials", ".ssh/config", "keys/id_ed25519", "tls/server.key"]
    homes = ["state/admin.key", "state/llmrun.db", "other/ray.token", "other/logs/control.log"]
    code = ["app.py", ".env.example", "config/settings.toml", "keys/public.txt", "environment.py"]
    for name in [*secrets, *homes, *code]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / ".llmrunignore").write_text("!.env\n")  # cannot include it again
    (tmp_path / "innocent.txt").symlink_to(tmp_path / ".env")
    (tmp_path / "nothing").symlink_to(tmp_path / "missing")
    package = pack(tmp_path)
    assert sorted(package.files) == sorted([*code, ".llmrunignore"])
    left_out = {".env", "config/.env.production", ".aws/", ".ssh/", "keys/id_ed25519", "tls/server.key", "innocent.txt"}
    assert set(package.secrets) == left_out | {"state/", "other/"}


def test_a_package_does_not_follow_links_out_of_its_folder(tmp_path: Path) -> None:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "notes.txt").write_text("x")
    app = write_app(tmp_path / "app" / "app.py", "")
    (app.parent / "sub").mkdir()
    inside = app.parent / "sub" / "same.py"
    inside.symlink_to(app)
    assert pack(app.parent).files == ("app.py", "sub/same.py")
    for target in (tmp_path / "private", tmp_path / "private" / "notes.txt"):
        link = app.parent / "sub" / "link"
        link.symlink_to(target)
        with pytest.raises(AppError, match=r"sub/link: the link leads out of the app's folder, to .*llmrunignore"):
            pack(app.parent)
        (app.parent / ".llmrunignore").write_text("link\n")
        assert "sub/link" not in pack(app.parent).files
        (app.parent / ".llmrunignore").unlink()
        link.unlink()


def test_a_home_folder_is_not_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "users" / "me"))
    (tmp_path / "users" / "me").mkdir(parents=True)
    for folder in (tmp_path / "users" / "me", tmp_path / "users", Path("/")):
        with pytest.raises(AppError, match=r"would contain your home folder.*a folder of its own"):
            pack(folder)


def test_a_plan_lists_the_files_of_its_code(capsys: pytest.CaptureFixture[str]) -> None:
    code = CodePackage("0", b"x" * 2048, tuple(f"f{number}.py" for number in range(12)), (".env",))
    show_code(code, whole=False)
    assert "code: 12 files, 2 KiB: f0.py" in (shown := " ".join(capsys.readouterr().err.split()))
    assert "f7.py and 4 more" in shown and "f8.py" not in shown and "left out, may contain secrets: .env" in shown
    show_code(code, whole=True)
    assert "f11.py" in capsys.readouterr().err


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("")
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(150 * 2**20)
    with pytest.raises(AppError, match=r"150 MiB; the limit is 100 MiB.* model.bin \(150 MiB\).*\.llmrunignore"):
        pack(tmp_path)


class FakeControl:
    """Yields the events of one deploy: a model becomes ready, then one fails."""

    def events(self, _: str) -> Iterator[Event]:
        yield Event(kind="step", model="one", text="starting the engine")
        yield Event(kind="warning", model="one", text="node b: the disk is full")
        yield Event(kind="ready", model="one")
        yield Event(kind="failed", model="two", text="out of memory")


def test_a_deploy_shows_what_is_ready_and_then_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(DeployError, match="two: out of memory"):
        show_events(deployment.follow(cast(Client, FakeControl()), "1"), "1", "http://cluster")
    shown = capsys.readouterr()
    assert "! one: node b: the disk is full" in shown.err
    assert "✓ one ready" in shown.err and "one: starting the engine" in shown.err
    assert "curl http://cluster/v1/chat/completions" in shown.out and '"model": "one"' in shown.out


def test_a_command_of_two_words_does_not_hide_a_file(home: Home) -> None:
    assert "cannot reach llmrun" in home.fails("deploy", "list")
    assert "cannot reach llmrun" in home.fails("deploy", "cancel", "5a1")
    assert "list: file not found" in home.fails("deploy", "./list")


def test_ctrl_c_detaches_from_a_deploy(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> Iterator[Event]:
        yield Event(kind="step", text="checking weights")
        raise KeyboardInterrupt

    with pytest.raises(typer.Exit) as exited, exit_on_interrupt():
        show_events(interrupted(), "5a1", "http://cluster")
    assert exited.value.exit_code == 130
    shown = capsys.readouterr()
    assert "The deploy continues on the cluster" in shown.err and shown.out == ""
    assert "llmrun deploy cancel 5a1" in shown.err


def test_every_command_argument_and_option_is_described() -> None:
    assert "None" not in commands()
