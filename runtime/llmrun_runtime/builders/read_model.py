"""From what a caller gives a builder to a model's spec, and a refusal of what cannot be served without control."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrun.app_file import absolute
from llmrun.decorator import HOOKS, build_spec, hooks_of, spec_of
from llmrun.errors import SpecError
from llmrun.spec import Code, ModelSpec
from llmrun.standalone import refused_alone
from llmrun_runtime.engines.registry import get_engine

Model = type | ModelSpec | Mapping[str, Any]
"""A class with `@llm`, a spec, or its fields."""
# Beside a spec's fields in a mapping, all of them or none: where the code is that runs beside the engine.
OF_CODE = ("app_file", "cls", "hooks")


def read_model(model: Model) -> tuple[ModelSpec, str]:
    """The spec, and the file of its class if that has code to run beside the engine.

    Raises SpecError for what is wrong, and for what cannot be without control.
    """
    spec, file = _read(model)
    if why := refused_alone(spec):
        raise SpecError(why)
    for path in filter(None, (spec.path, file)):
        if not Path(path).expanduser().is_absolute():
            raise SpecError(f"{spec.name}: {path} is looked for on each node: write the whole path")
    if why := get_engine(spec.engine).refuses(spec):
        raise SpecError(f"{spec.name}: {why}")
    return spec, file


def _read(model: Model) -> tuple[ModelSpec, str]:
    if isinstance(model, ModelSpec):
        if model.code:
            raise SpecError(f"{model.name}: its class's code lies in control: give the class itself")
        return model, ""
    if isinstance(model, type):
        return _read_class(model)
    if isinstance(model, Mapping):
        fields = dict(model)
        file, cls, hooks = (fields.pop(name, None) for name in OF_CODE)
        spec = build_spec(fields)
        return _with_code(spec, file, cls, hooks) if file or cls or hooks else (spec, "")
    raise SpecError(f"{model!r} is no model: a class with @llm, a spec, or its fields")


def _read_class(cls: type) -> tuple[ModelSpec, str]:
    spec, hooks = spec_of(cls), hooks_of(cls)
    if not spec:
        raise SpecError(f"{cls.__name__} is no model: put @llm on it")
    try:
        file = Path(inspect.getfile(cls)).absolute()
    except (TypeError, OSError):  # of a console, or of a notebook
        if hooks:
            text = f"{cls.__name__} has {' and '.join(hooks)} and is in no file: nodes read it from one: write it there"
            raise SpecError(text) from None
        return spec, ""
    spec = absolute(spec, file.parent)
    if not hooks:
        return spec, ""
    if "<locals>" in cls.__qualname__:
        raise SpecError(f"{cls.__qualname__}: a class with hooks stands at the top of its file, not in a function")
    return _with_code(spec, str(file), cls.__qualname__, hooks)


def _with_code(spec: ModelSpec, file: Any, cls: Any, hooks: Any) -> tuple[ModelSpec, str]:
    if not (isinstance(file, str) and file and isinstance(cls, str) and cls and isinstance(hooks, Sequence) and hooks):
        raise SpecError(f"{spec.name}: {', '.join(OF_CODE)} go together: `llmrun export` writes them")
    if unknown := [hook for hook in hooks if hook not in HOOKS]:
        raise SpecError(f"{spec.name}: hooks={unknown!r}: there are {', '.join(HOOKS)}")
    code = Code(package="", file=Path(file).name, cls=cls, hooks=tuple(hooks))
    return spec.model_copy(update={"code": code}), file
