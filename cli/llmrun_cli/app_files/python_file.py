"""`python -m llmrun_cli.app_files.python_file FILE`: imports an app file in a process of its own and prints its models as JSON.

`load_app` starts that process. The file's own output goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmrun.app_file import absolute, load_file
from llmrun.decorator import hooks_of, spec_of
from llmrun.errors import AppError, SpecError
from llmrun.spec import ModelSpec

LOAD_TIMEOUT_S = 120
EXAMPLE = """\
    from llmrun import llm

    @llm("Qwen/Qwen2.5-0.5B-Instruct")
    class Assistant: ..."""


class LoadedModel(BaseModel):
    """One class of the app file."""

    cls: str
    hooks: tuple[str, ...]
    spec: ModelSpec

    @property
    def needs_code(self) -> bool:
        """Whether the class's own code goes along; without it a version is its spec alone."""
        return bool(self.hooks or self.spec.requirements)


def load_app(path: Path) -> list[LoadedModel]:
    """The models of an app file, in its order, their paths absolute. Raises AppError."""
    if not path.is_file():
        raise AppError(f"{path}: there is no such file")
    with tempfile.NamedTemporaryFile(suffix=".json") as answer:
        command = [sys.executable, "-m", "llmrun_cli.app_files.python_file", str(path), answer.name]
        try:
            code = subprocess.run(
                command,
                stdout=sys.stderr.fileno(),
                stdin=subprocess.DEVNULL,
                timeout=LOAD_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise AppError(f"{path}: importing it took over {LOAD_TIMEOUT_S} s") from None
        text = Path(answer.name).read_text()
    if not text:
        raise AppError(f"{path}: importing it ended Python with exit code {code}")
    result = json.loads(text)
    if "error" in result:
        raise AppError(result["error"], result["detail"])
    return [LoadedModel.model_validate(item) for item in result["models"]]


def _inspect(path: Path) -> dict[str, Any]:
    try:
        module = load_file(path)
    except SpecError as error:
        return {"error": f"{_place(path, error)}: {error}", "detail": ""}
    except SyntaxError as error:
        return {
            "error": f"{error.filename or path} has a syntax error",
            "detail": "".join(traceback.format_exception_only(error)),
        }
    except BaseException as error:  # noqa: BLE001 - whatever the user's file raises is the user's to see
        what = traceback.format_exception_only(error)[-1].strip()
        return {"error": f"{path} failed on import: {what}", "detail": _users_traceback(path, error)}
    classes = {id(item): item for item in vars(module).values() if isinstance(item, type) and spec_of(item)}
    if not classes:
        return {"error": f"{path} has no model: put @llm on a class, like\n\n{EXAMPLE}", "detail": ""}
    models, owners = [], dict[str, str]()
    for cls in classes.values():
        spec = spec_of(cls)
        assert spec
        if spec.name in owners:
            return {
                "error": f"{path}: {owners[spec.name]} and {cls.__name__} are both named {spec.name!r}: "
                f"give one of them another name=",
                "detail": "",
            }
        owners[spec.name] = cls.__name__
        spec = absolute(spec, path.absolute().parent)
        models.append(LoadedModel(cls=cls.__qualname__, hooks=hooks_of(cls), spec=spec).model_dump(mode="json"))
    return {"models": models}


def _place(path: Path, error: BaseException) -> str:
    """`file:line` of the user's code that an error came from."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _users_traceback(path: Path, error: BaseException) -> str:
    """The traceback from the user's first line on."""
    tb = error.__traceback__
    while tb and Path(tb.tb_frame.f_code.co_filename) != path.absolute():
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb)).rstrip()


def main() -> None:
    """Write the result to the file named second."""
    path, answer = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = [str(path)]
    with contextlib.redirect_stdout(sys.stderr):
        result = _inspect(path)
    answer.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # threads that the file started do not keep us


if __name__ == "__main__":
    main()
