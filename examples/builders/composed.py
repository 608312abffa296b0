"""A model inside an application of your own, asked by its handle."""

import sys
from collections.abc import AsyncIterator
from typing import Any

from models import Assistant
from ray import serve
from starlette.requests import Request
from starlette.responses import StreamingResponse

from llmrun_runtime.builders import build_llm_deployment


class Poet:
    def __init__(self, assistant: Any) -> None:
        self._assistant = assistant.options(stream=True)

    async def __call__(self, request: Request) -> StreamingResponse:
        return StreamingResponse(self._verse((await request.body()).decode()), media_type="text/plain")

    async def _verse(self, about: str) -> AsyncIterator[str]:
        messages = [{"role": "user", "content": f"Write a verse about {about}."}]
        asked = {"messages": messages, "stream": True, "max_tokens": 20, "temperature": 0}
        async for chunk in self._assistant.chat.remote(asked):
            yield chunk["choices"][0]["delta"].get("content") or ""


if __name__ == "__main__":
    application = serve.deployment(Poet).bind(build_llm_deployment(Assistant))
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if sys.argv[1:] else 8000})
    serve.run(application)
    print("ready", flush=True)
    sys.stdin.read()
    serve.shutdown()
