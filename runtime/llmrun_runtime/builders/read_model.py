"""Converts a builder's argument to a spec, and rejects models that cannot be served without control."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llmrun.app_file import resolve_paths
from llmrun.decorator import HOOKS, build_spec, hooks_of, spec_of
from llmrun.errors import SpecError
from llmrun.spec import Code, ModelSpec
from llmrun.standalone import check_standalone
from llmrun_runtime.engines.registry import get_engine

log = logging.getLogger("ray.serve")
Model = type | ModelSpec | Mapping[str, Any]
"""A class with `@llm`, a spec, or a mapping of a spec's fields."""
# Keys of such a mapping in addition to the spec's fields, all or none: the class whose hooks run in the engine.
CODE_KEYS = ("app_file", "cls", "hooks")


def read_model(model: Model) -> tuple[ModelSpec, str]:
    """Return the spec, and the file of its class if the class has hooks, else "".

    Logs a warning for options without effect. Raises SpecError for invalid models, and for those that require control.
    """
    spec, file = _read(model)
    warning = check_standalone(spec)
    for path in filter(None, (spec.path, file)):
        if not Path(path).expanduser().is_absolute():
            raise SpecError(f"{spec.name}: {path} must be an absolute path: each node reads it")
    if reason := get_engine(spec.engine).refuses(spec):
        raise SpecError(f"{spec.name}: {reason}")
    if warning:
        log.warning("%s", warning)
    return spec, file


def _read(model: Model) -> tuple[ModelSpec, str]:
    if isinstance(model, ModelSpec):
        if model.code:
            raise SpecError(f"{model.name}: the code of its class is stored in control: pass the class itself")
        return model, ""
    if isinstance(model, type):
        return _read_class(model)
    if isinstance(model, Mapping):
        fields = dict(model)
        file, cls, hooks = (fields.pop(name, None) for name in CODE_KEYS)
        spec = build_spec(fields)
        return _with_code(spec, file, cls, hooks) if file or cls or hooks else (spec, "")
    raise SpecError(f"{model!r} is not a model: pass a class with @llm, a spec, or a mapping of its fields")


def _read_class(cls: type) -> tuple[ModelSpec, str]:
    spec, hooks = spec_of(cls), hooks_of(cls)
    if not spec:
        raise SpecError(f"{cls.__name__} is not a model: decorate it with @llm")
    try:
        file = Path(inspect.getfile(cls)).absolute()
    except (TypeError, OSError):  # a class of an interactive session or a notebook
        if hooks:
            text = f"{cls.__name__} has {' and '.join(hooks)} but no source file: define it in a file"
            raise SpecError(text) from None
        return spec, ""
    spec = resolve_paths(spec, file.parent)
    if not hooks:
        return spec, ""
    if "<locals>" in cls.__qualname__:
        raise SpecError(f"{cls.__qualname__}: a class with hooks must be at the top level of its file")
    return _with_code(spec, str(file), cls.__qualname__, hooks)


def _with_code(spec: ModelSpec, file: Any, cls: Any, hooks: Any) -> tuple[ModelSpec, str]:
    if not (isinstance(file, str) and file and isinstance(cls, str) and cls and isinstance(hooks, Sequence) and hooks):
        raise SpecError(f"{spec.name}: {', '.join(CODE_KEYS)} must be given together, as `llmrun export` writes them")
    if unknown := [hook for hook in hooks if hook not in HOOKS]:
        raise SpecError(f"{spec.name}: hooks={unknown!r}: unknown hook. Available: {', '.join(HOOKS)}")
    code = Code(package="", file=Path(file).name, cls=cls, hooks=tuple(hooks))
    return spec.model_copy(update={"code": code}), file
