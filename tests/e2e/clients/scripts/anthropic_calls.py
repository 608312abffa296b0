"""Calls of Anthropic's client. Prints their results as JSON."""

import json
import sys

import anthropic

ASK = [{"role": "user", "content": "Name the capital of France."}]
client = anthropic.Anthropic(base_url=sys.argv[1], api_key="none")
usual = {"model": "talker", "messages": ASK, "max_tokens": 12, "extra_body": {"temperature": 0}}


def failure(call):
    try:
        call()
    except anthropic.APIStatusError as error:
        return f"{type(error).__name__} {error.body['error']['type']}", error.body["error"]["message"]


def streamed():
    with client.messages.stream(**usual) as stream:
        return "".join(stream.text_stream)


long = [{"role": "user", "content": "hello " * 20_000}]
found = {
    "message": client.messages.create(**usual).content[0].text,
    "stream": streamed(),
    "count": "number" if client.messages.count_tokens(model="talker", messages=ASK).input_tokens > 10 else "",
    "unknown model": failure(lambda: client.messages.create(**usual | {"model": "nobody"}))[0],
    "too long": " ".join(failure(lambda: client.messages.create(**usual | {"messages": long}))),
}
print(json.dumps(found))
