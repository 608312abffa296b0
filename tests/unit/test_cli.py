"""The command line without a cluster: app files, packages, and what it says of bad ones."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from llmrun.errors import AppError
from llmrun_cli.app_files.package import pack
from llmrun_cli.app_files.python_file import load_app
from tests.support.cluster import Home, write_app


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("class A: ...", ["has no model", "put @llm on a class", '@llm("Qwen']),
        ("class A:\n  pass\n)", ["has a syntax error", "line 5"]),
        ('@llm("a/b")\nclass A: ...\n@llm("a/b")\nclass a: ...', ["A and a are both named 'a'", "another name="]),
        ('@llm("a/b", min_replica=1)\nclass A: ...', ["app.py:3: ", "did you mean min_replicas="]),
        ("import os\nos._exit(3)", ["ended Python with exit code 3"]),
    ],
)
def test_app_files_that_cannot_be_used(home: Home, tmp_path: Path, text: str, words: list[str]) -> None:
    said = home.fails("deploy", write_app(tmp_path / "app.py", text))
    for word in words:
        assert word in said
    assert "Traceback" not in said


def test_a_file_that_raises_shows_the_users_own_traceback(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", "def inner():\n    raise RuntimeError('boom')\n\ninner()\n")
    said = home.fails("deploy", app)
    assert "failed on import: RuntimeError: boom" in said
    frames = [line for line in said.splitlines() if line.startswith("  File ")]
    assert [frame.split(", ")[1] for frame in frames] == ["line 6", "line 4"]
    assert all("app.py" in frame for frame in frames)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["missing.py"], "missing.py: there is no such file"),
        (["./missing.py::A"], "there is no such file"),
        (["nonsense"], "there is no such file, and a model's name looks like org/model"),
        (["org/model", "--accelerator", "A10G:0"], "'A10G:2'"),
        (["org/model", "--", "8192"], "flags start with '--'"),
    ],
)
def test_targets_that_cannot_be_used(home: Home, arguments: list[str], words: str) -> None:
    assert words in home.fails("deploy", *arguments)


def test_a_name_that_the_file_does_not_have(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", '@llm("a/b")\nclass Assistant: ...\n')
    said = home.fails("deploy", f"{app}::Asistant")
    assert "has no model 'Asistant'" in said and "it has Assistant (assistant)" in said


def test_nothing_answers(home: Home, tmp_path: Path) -> None:
    app = write_app(tmp_path / "app.py", '@llm("a/b")\nclass A: ...\n')
    for command in (["status"], ["deploy", str(app)], ["delete", "a", "--yes"], ["logs", "a"], ["chat", "a", "Hi"]):
        said = home.fails(*command)
        assert home.url in said and "llmrun up" in said
    assert "LLMRUN_URL" in home.fails("status", LLMRUN_URL="nonsense://x")


def test_something_else_answers(home: Home) -> None:
    server = subprocess.Popen(
        [sys.executable, "-m", "http.server", "--bind", "127.0.0.1", str(home.port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        for _ in range(100):
            try:
                socket.create_connection(("127.0.0.1", home.port), timeout=1).close()
                break
            except ConnectionRefusedError:
                server.poll()
        assert "which is not llmrun's" in home.fails("status")
        said = home.fails("up")
        assert f"127.0.0.1:{home.port} cannot be listened on" in said and "--port" in said
    finally:
        server.terminate()
        server.wait(10)


def test_paths_are_from_the_app_files_folder(tmp_path: Path) -> None:
    app = write_app(tmp_path / "apps" / "app.py", '@llm("./weights")\nclass A: ...\n@llm("~/w")\nclass B: ...\n')
    assert [str(item.spec.model) for item in load_app(app)] == [str(tmp_path / "apps" / "weights"), "~/w"]


def test_an_app_file_may_import_its_neighbours_and_print(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 'from-neighbour'\n")
    text = "from neighbour import NAME\nprint('loading')\n@llm('a/b', name=NAME)\nclass A: ...\n"
    assert load_app(write_app(tmp_path / "app.py", text))[0].spec.name == "from-neighbour"
    assert capfd.readouterr().out == ""


def test_packages_are_the_same_for_the_same_files(tmp_path: Path) -> None:
    made: list[tuple[str, bytes]] = []
    for folder in (tmp_path / "one", tmp_path / "two"):
        for name in ("app.py", "sub/helper.py", "sub/deep.txt", "skip/x.py", "__pycache__/app.pyc", "weights/w.bin"):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (folder / ".gitignore").write_text("skip/\n")
        (folder / "sub" / ".llmrunignore").write_text("*.txt\n")
        os.utime(folder / "app.py", (len(made), len(made)))
        made.append(pack(folder, leave_out=[folder / "weights"]))
    assert made[0] == made[1]
    with zipfile.ZipFile(BytesIO(made[0][1])) as package:
        assert package.namelist() == [".gitignore", "app.py", "sub/.llmrunignore", "sub/helper.py"]


def test_a_package_that_is_too_large_names_its_largest_files(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text("")
    with (tmp_path / "model.bin").open("wb") as file:
        file.truncate(150 * 2**20)
    with pytest.raises(AppError, match=r"150 MiB, over 100: largest are model.bin \(150 MiB\).*\.llmrunignore"):
        pack(tmp_path)
