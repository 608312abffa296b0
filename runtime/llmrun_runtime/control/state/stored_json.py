"""Reads JSON from the database. A later release may have written it, with fields that this one does not have."""

from __future__ import annotations

import json
import types
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

Model = TypeVar("Model", bound=BaseModel)


def read_stored(model: type[Model], text: str) -> Model:
    """Return stored JSON as the model, without unknown fields. Raises ValueError with a cause of one line."""
    try:
        return model.model_validate_json(json.dumps(_without_unknown(model, json.loads(text))))
    except Exception as error:  # a validator of this release may raise anything for the data of another one
        raise ValueError(f"{model.__name__}: {_cause(error)}") from error


def read_stored_dict(model: type[Model], text: str) -> dict[str, Model]:
    """Return a stored JSON object of models, like `read_stored`."""
    try:
        known = json.dumps(_without_unknown(dict[str, model], json.loads(text)))  # type: ignore[valid-type]
        return TypeAdapter(dict[str, model]).validate_json(known)  # type: ignore[valid-type]
    except Exception as error:  # as above
        raise ValueError(f"{model.__name__}: {_cause(error)}") from error


def _without_unknown(kind: Any, value: Any) -> Any:
    """Remove the fields that the models in the type `kind` do not have."""
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        if not isinstance(value, dict):
            return value  # a model may be stored in a short form
        fields = kind.model_fields
        return {key: _without_unknown(fields[key].annotation, item) for key, item in value.items() if key in fields}
    origin, args = get_origin(kind), get_args(kind)
    if origin is dict and isinstance(value, dict):
        return {key: _without_unknown(args[1], item) for key, item in value.items()}
    if origin is tuple and isinstance(value, list):
        return [_without_unknown(args[0], item) for item in value]
    if origin in (Annotated, Union, types.UnionType):
        for arg in args:
            value = _without_unknown(arg, value)
    return value


def _cause(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return (str(error) or type(error).__name__).splitlines()[0]
