"""Bodies that are valid by vLLM's own schemas, for each path: no 5xx, no hang, and errors in the path's own shape."""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.core.result import Ok

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]
EXAMPLES = 20
PATHS = {
    "/v1/chat/completions": "talker",
    "/v1/completions": "talker",
    "/v1/responses": "talker",
    "/v1/messages": "talker",
    "/v1/messages/count_tokens": "talker",
    "/tokenize": "talker",
    "/detokenize": "talker",
    "/v1/embeddings": "embedder",
    "/pooling": "embedder",
    "/score": "embedder",
    "/rerank": "embedder",
}
# Otherwise most requests would generate until the end of the context, some of them many times.
BOUNDS: dict[str, Any] = {
    **dict.fromkeys(("max_tokens", "max_completion_tokens", "max_output_tokens"), 4),
    **{"min_tokens": 0, "n": 1, "best_of": 1},
}
REQUIRED = {path: ("max_tokens",) for path in ("/v1/chat/completions", "/v1/completions", "/v1/messages")}
REQUIRED["/v1/responses"] = ("max_output_tokens",)
SCHEMA = """
import json
from vllm.entrypoints.pooling.embed import api_router as embed
from vllm.entrypoints.pooling.pooling import api_router as pooling
from vllm.entrypoints.pooling.scoring import api_router as scoring
from vllm.entrypoints.launchers.app import build_app
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser

args = make_arg_parser(FlexibleArgumentParser()).parse_args([])
app = build_app(args, ("generate",))
for router in (embed.router, pooling.router, scoring.router):  # those of a model for embeddings
    app.include_router(router)
print(json.dumps(app.openapi()))
"""


@functools.cache
def schema() -> Any:
    done = subprocess.run([sys.executable, "-c", SCHEMA], capture_output=True, text=True, timeout=200, check=True)
    return schemathesis.openapi.from_dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("path", PATHS)
def test_no_valid_body_is_a_server_error(http: httpx.Client, path: str) -> None:
    operations = [result.ok() for result in schema().get_all_operations() if isinstance(result, Ok)]
    (operation,) = [each for each in operations if (each.path, each.method) == (path, "post")]
    statuses: list[int] = []

    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )
    def ask(case: Any) -> None:
        if not isinstance(case.body, dict):
            return
        body = {**case.body, "model": PATHS[path]}
        body |= {
            name: bound
            for name, bound in BOUNDS.items()
            if body.get(name) is not None or name in REQUIRED.get(path, ())
        }
        answer = http.post(path, content=json.dumps(body), headers={"content-type": "application/json"}, timeout=30)
        statuses.append(answer.status_code)
        assert answer.status_code < 500, (body, answer.text)
        if answer.status_code >= 400:
            error = answer.json()["error"]
            assert error["message"] and "\n" not in error["message"], (body, answer.text)
            assert (answer.json().get("type") == "error") == path.startswith("/v1/messages")

    ask()
    assert statuses
