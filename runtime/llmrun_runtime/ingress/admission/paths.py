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
_AZURE = re.compile(r"/openai/deployments/(.+/.+)")


def canonical_path(path: str, known: Collection[str]) -> tuple[str, str]:
    """Return the path that is meant, and the model that it names (Azure's deployment; "" for none).

    The path is one of `known`, `/v1/models` or below, or as it was if its meaning is not plain.
    """
    plain = re.sub(r"/{2,}", "/", path).rstrip("/")
    if azure := _AZURE.fullmatch(plain):
        for suffix in sorted((each.removeprefix(V1) for each in known), key=len, reverse=True):
            deployment = azure[1].removesuffix(suffix)
            if deployment != azure[1] and deployment:
                return V1 + suffix if V1 + suffix in known else suffix, deployment
    plain = plain.removeprefix("/openai")
    while plain.startswith(V1 + V1 + "/"):
        plain = plain.removeprefix(V1)
    for meant in (plain, V1 + plain):
        if meant in known or meant == MODELS or meant.startswith(MODELS + "/"):
            return meant, ""
    return path, ""


def path_not_found(path: str, known: Collection[str]) -> HTTPError:
    """The error for a path that no model serves."""
    if path.startswith(RESPONSES + "/"):
        return HTTPError(404, f"{path}: {KEPT_NOWHERE}", "responses_not_kept")
    similar = similar_names(path, known, 1)
    hint = f". Did you mean {similar[0]}?" if similar else ". See GET /openapi.json"
    return HTTPError(404, f"path {path} not found{hint}", "path_not_found")
