"""Calls of LiteLLM. Prints their results as JSON."""

import json
import sys

import litellm

URL = sys.argv[1]
ASK = [{"role": "user", "content": "Name the capital of France."}]
usual = {"api_base": f"{URL}/v1", "api_key": "none", "messages": ASK, "temperature": 0, "max_tokens": 12}


def text(model, **more):
    return litellm.completion(model=model, **usual | more).choices[0].message.content


def failure(**more):
    try:
        litellm.completion(**{"model": "openai/talker"} | usual | more)
    except (litellm.NotFoundError, litellm.BadRequestError) as error:
        return type(error).__name__


chunks = litellm.completion(model="openai/talker", stream=True, **usual)
found = {
    "chat": text("openai/talker"),
    "stream": "".join(chunk.choices[0].delta.content or "" for chunk in chunks),
    "anthropic": text("anthropic/talker", api_base=URL),
    "unknown model": failure(model="openai/nobody"),
    "too long": failure(messages=[{"role": "user", "content": "hello " * 20_000}]),
}
print(json.dumps(found))
