"""Calls a model from your own Serve application, through its handle."""

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
        return StreamingResponse(self._write_verse((await request.body()).decode()), media_type="text/plain")

    async def _write_verse(self, topic: str) -> AsyncIterator[str]:
        messages = [{"role": "user", "content": f"Write a verse about {topic}."}]
        body = {"messages": messages, "stream": True, "max_tokens": 20, "temperature": 0}
        async for chunk in self._assistant.chat.remote(body):
            yield chunk["choices"][0]["delta"].get("content") or ""


if __name__ == "__main__":
    application = serve.deployment(Poet).bind(build_llm_deployment(Assistant))
    serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[1]) if sys.argv[1:] else 8000})
    serve.run(application)
    print("ready", flush=True)
    sys.stdin.read()  # serve until stdin is closed, or Ctrl-C
    serve.shutdown()
