"""`@llm`: turns a class into a model's definition, and rejects an invalid one at once.

Depends on no cluster, app file or command line.
"""

from __future__ import annotations

import contextlib
import difflib
import inspect
import json
import textwrap
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, TypeVar, Unpack

from pydantic import ValidationError

from llmrun.deployment import deploy
from llmrun.docstrings import attribute_docstrings
from llmrun.errors import SpecError
from llmrun.options import LLMOptions
from llmrun.spec import ModelSpec, to_label
from llmrun.weights import Weights

T = TypeVar("T", bound=type)
HOOKS = {"on_start": ("self",), "on_request": ("self", "request")}
CONTEXT = "context"
ATTRIBUTE = "__llmrun_spec__"
_collected: ContextVar[list[type] | None] = ContextVar("_collected", default=None)


def llm(model: str | Weights = "", **options: Unpack[LLMOptions]) -> Callable[[T], T]:
    """Define a model: `@llm("org/model")` on a class. `llmrun deploy app.py` serves it under the class's name.

    The class may define two hooks, plain or async methods: `on_start(self)` runs once, before the first request;
    `on_request(self, request)` receives the JSON body of each request, a dict, and returns the one for the engine. Of a
    form, as for audio, it gets the fields. `on_request(self, request, context)` also gets a `RequestContext`.

    Args:
        model: The source of the weights: `org/name` or `org/name@revision` on Hugging Face; an address like
            `s3://bucket/path` or `gs://bucket/path`; or a path, `/…`, `~…`, `file://…` or, relative to the app file,
            `./…`. `Weights(…)` sets more options.

    Raises:
        SpecError: an argument is invalid. The message contains its name, its value and the fix.
    """
    if isinstance(model, type):
        raise SpecError(f'@llm on {model.__name__}: a model is required: write @llm("org/model")')
    available = ("model", *LLMOptions.__annotations__)
    for key, value in options.items():
        if key not in available:
            close = difflib.get_close_matches(key, available, n=1)
            hint = f"did you mean {close[0]}=?" if close else "available: " + ", ".join(available)
            raise SpecError(f"@llm: unknown option {key}={value!r}: {hint}")
    if not isinstance(model, Weights) and (not isinstance(model, str) or not model.strip()):
        raise SpecError(f'model={model!r}: must be a source of weights, like @llm("org/model") or @llm("./folder")')

    def decorate(cls: T) -> T:
        if not isinstance(cls, type):
            raise SpecError(f"@llm must be applied to a class, not to {cls!r}: write `class Assistant: ...` under it")
        _check_hooks(cls)
        fields = {"model": model, **options}
        if fields.get("name") is None:
            fields["name"] = to_label(cls.__name__)
        setattr(cls, ATTRIBUTE, build_spec(fields))
        if (collected := _collected.get()) is not None:
            collected.append(cls)
        if not hasattr(cls, "deploy"):
            setattr(cls, "deploy", classmethod(deploy))  # noqa: B010 - type checkers know no such attribute
        return cls

    return decorate


def _with_options(docstring: str) -> str:
    """Add every option and its default to the `Args:` section, for `help(llm)`."""
    lines = []
    for name, description in attribute_docstrings(LLMOptions).items():
        default = ModelSpec.model_fields[name].default
        entry = f"    {name}: {description}"
        if isinstance(default, bool | int | float | str):
            entry += f" Default: {json.dumps(default) if isinstance(default, str) else default}."
        lines.append(textwrap.fill(entry, 110, subsequent_indent=" " * 8, break_on_hyphens=False))
    return inspect.cleandoc(docstring).replace("\n\nRaises:", "\n" + "\n".join([*lines, "", "Raises:"]))


llm.__doc__ = _with_options(llm.__doc__ or "")


def build_spec(fields: Mapping[str, Any]) -> ModelSpec:
    """Validate `fields`. Raises SpecError with the first problem, in one line."""
    try:
        return ModelSpec.model_validate(dict(fields))
    except ValidationError as error:
        first = error.errors()[0]
        cause = first.get("ctx", {}).get("error")
        if isinstance(cause, ValueError):
            raise SpecError(str(cause)) from None
        field = ".".join(str(part) for part in first["loc"][:1])
        message = first["msg"][:1].lower() + first["msg"][1:]
        raise SpecError(f"{field}={fields.get(field)!r}: {message}") from None


@contextlib.contextmanager
def collecting() -> Iterator[list[type]]:
    """Collect the classes that `@llm` decorates in this block, also those that lose their name, as in a loop."""
    classes: list[type] = []
    token = _collected.set(classes)
    try:
        yield classes
    finally:
        _collected.reset(token)


def spec_of(cls: type) -> ModelSpec | None:
    """Return the spec that `@llm` attached to this class itself, not to a base class."""
    spec = vars(cls).get(ATTRIBUTE)
    return spec if isinstance(spec, ModelSpec) else None


def hooks_of(cls: type) -> tuple[str, ...]:
    """Return the names of the hooks that the class defines or inherits."""
    return tuple(hook for hook in HOOKS if callable(getattr(cls, hook, None)))


def takes_context(signature: inspect.Signature) -> bool:
    """Whether a hook wants the request's context: it has a parameter of that name."""
    return CONTEXT in signature.parameters


def _check_hooks(cls: type) -> None:
    """Raises SpecError if a hook cannot take its arguments."""
    for hook in hooks_of(cls):
        parameters = HOOKS[hook]
        try:
            signed = inspect.signature(getattr(cls, hook))
            signed.bind(*parameters, **({CONTEXT: None} if takes_context(signed) and hook == "on_request" else {}))
        except TypeError:
            returns = {"on_start": "", "on_request": " -> dict"}
            signature = ", ".join(parameters)
            raise SpecError(
                f"{cls.__name__}.{hook} must take ({signature}): write `def {hook}({signature}){returns[hook]}: ...`"
            ) from None
