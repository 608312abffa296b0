"""App files in Python.

`load_app` runs this module as `python -m llmrun_cli.app_files.python_file FILE RESULT`. That process imports the app
file and writes its models to RESULT as JSON. The file's own output goes to standard error.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import tokenize
import traceback
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from llmrun.app_file import load_file, resolve_paths
from llmrun.decorator import hooks_of, spec_of
from llmrun.errors import AppError, SpecError
from llmrun.spec import ModelSpec

LOAD_TIMEOUT_S = 120
EXAMPLE = """\
    from llmrun import llm

    @llm("Qwen/Qwen2.5-0.5B-Instruct")
    class Assistant: ..."""


class LoadedModel(BaseModel):
    """One model of an app file."""

    cls: str
    hooks: tuple[str, ...]
    spec: ModelSpec

    @property
    def needs_code(self) -> bool:
        """Whether the class's own code must be deployed with its spec."""
        return bool(self.hooks or self.spec.requirements)


def load_app(path: Path) -> tuple[list[LoadedModel], list[str]]:
    """Return the models of a Python file in its order, with absolute paths, and warnings. Raises AppError."""
    if not path.is_file():
        raise AppError(f"{path}: file not found")
    with tempfile.NamedTemporaryFile(suffix=".json") as result_file:
        command = [sys.executable, "-P", "-m", "llmrun_cli.app_files.python_file", str(path), result_file.name]
        try:
            code = subprocess.run(
                command,
                stdout=sys.stderr.fileno(),
                stdin=subprocess.DEVNULL,
                timeout=LOAD_TIMEOUT_S,
                check=False,
            ).returncode
        except subprocess.TimeoutExpired:
            raise AppError(f"{path}: import timed out after {LOAD_TIMEOUT_S} s") from None
        text = Path(result_file.name).read_text()
    if not text:
        raise AppError(f"{path}: Python exited with code {code} during import")
    result = json.loads(text)
    if "error" in result:
        raise AppError(result["error"], result["detail"])
    return [LoadedModel.model_validate(item) for item in result["models"]], result["warnings"]


def _inspect(path: Path) -> dict[str, Any]:
    """Return the file's models, or an error and its detail."""
    try:
        _check_encoding(path)
        file = load_file(path)
    except SpecError as error:
        return {"error": f"{_location(path, error)}: {error}", "detail": ""}
    except SyntaxError as error:  # also: not UTF-8
        return {
            "error": f"{error.filename or path}: syntax error",
            "detail": "".join(traceback.format_exception_only(error)),
        }
    except BaseException as error:  # noqa: BLE001 - a user's file may raise anything; the user gets to see it
        text = traceback.format_exception_only(error)[-1].strip()
        return {"error": f"{path}: import failed: {text}", "detail": _user_traceback(path, error)}
    classes = file.models()
    if not classes:
        return {"error": f"{path}: no models found. Put @llm on a class:\n\n{EXAMPLE}", "detail": ""}
    models, class_names = [], dict[str, str]()
    for cls in classes:
        spec = spec_of(cls)
        assert spec
        if spec.name in class_names:
            return {
                "error": f"{path}: duplicate model name {spec.name!r} ({class_names[spec.name]} and {cls.__name__}). "
                f"Set name= on one of them.",
                "detail": "",
            }
        class_names[spec.name] = cls.__name__
        spec = resolve_paths(spec, path.absolute().parent)
        models.append(LoadedModel(cls=cls.__qualname__, hooks=hooks_of(cls), spec=spec).model_dump(mode="json"))
    warnings = [
        f"{path}: model {spec_of(cls).name!r} is not deployed: its class is defined in {cls.__module__}. Import the "  # type: ignore[union-attr]
        f"class {cls.__name__} by its name, or assign it to a name here, to deploy it"
        for cls in file.others()
    ]
    return {"models": models, "warnings": warnings}


def _check_encoding(path: Path) -> None:
    """Raise SyntaxError for a file that `python FILE` refuses: an import does not look at comments."""
    try:
        with tokenize.open(path) as source:
            source.read()
    except UnicodeDecodeError as error:
        raise SyntaxError(f"{error.reason} at byte {error.start}: save the file as UTF-8") from None


def _location(path: Path, error: BaseException) -> str:
    """Return `file:line` of the line in the user's file that raised the error."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if Path(f.filename) == path.absolute()]
    return f"{path}:{lines[-1]}" if lines else str(path)


def _user_traceback(path: Path, error: BaseException) -> str:
    """Return the traceback without the frames before the user's file."""
    tb = error.__traceback__
    while tb and Path(tb.tb_frame.f_code.co_filename) != path.absolute():
        tb = tb.tb_next
    return "".join(traceback.format_exception(type(error), error, tb)).rstrip()


def main() -> None:
    """Inspect the file named by the first argument; write the result to the file named by the second."""
    path, result_path = Path(sys.argv[1]), Path(sys.argv[2])
    sys.argv = [str(path)]
    with contextlib.redirect_stdout(sys.stderr):
        result = _inspect(path)
    result_path.write_text(json.dumps(result))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)  # do not wait for threads that the file started


if __name__ == "__main__":
    main()
