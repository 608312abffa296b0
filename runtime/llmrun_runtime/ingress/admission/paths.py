"""Reads the paths that clients build from their base URLs: `/chat/completions`, `/v1/v1/…`, Azure's. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection

from llmrun_runtime.ingress.admission.target import similar_names
from llmrun_runtime.ingress.endpoints.models import MODELS
from llmrun_runtime.ingress.error_shapes import RESPONSES
from llmrun_runtime.ingress.errors import HTTPError

V1 = "/v1"
KEPT_NOWHERE = "llmrun keeps no responses. Send the whole conversation in 'input'"
_AZURE = "/openai/deployments/"
_REPEATED_V1 = re.compile(r"^(?:/v1)+(?=/v1/)")
MAX_SHOWN = 200


def canonical_path(path: str, known: Collection[str]) -> tuple[str, str]:
    """Return the path that is meant, and the model that it names (Azure's deployment; "" for none).

    The path is one of `known`, `/v1/models` or below, or as it was if its meaning is not plain.
    """
    plain = re.sub(r"/{2,}", "/", path).rstrip("/")
    if plain.startswith(_AZURE):
        named = plain.removeprefix(_AZURE)
        for suffix in sorted((each.removeprefix(V1) for each in known), key=len, reverse=True):
            deployment = named.removesuffix(suffix)
            if deployment != named and deployment:
                return V1 + suffix if V1 + suffix in known else suffix, deployment
    plain = plain.removeprefix("/openai")
    plain = _REPEATED_V1.sub("", plain)
    for meant in (plain, V1 + plain):
        if meant in known or meant == MODELS or meant.startswith(MODELS + "/"):
            return meant, ""
    return path, ""


def path_not_found(path: str, known: Collection[str]) -> HTTPError:
    """The error for a path that no model serves."""
    path = path[:MAX_SHOWN]
    if path.startswith(RESPONSES + "/"):
        return HTTPError(404, f"{path}: {KEPT_NOWHERE}", "responses_not_kept")
    similar = similar_names(path, known, 1)
    hint = f". Did you mean {similar[0]}?" if similar else ". See GET /openapi.json"
    return HTTPError(404, f"path {path} not found{hint}", "path_not_found")
