"""Calls of OpenAI's client. Prints their results as JSON."""

import json
import sys

import openai

URL = sys.argv[1]
ASK = [{"role": "user", "content": "Name the capital of France."}]
client = openai.OpenAI(base_url=f"{URL}/v1", api_key="none")
azure = openai.AzureOpenAI(azure_endpoint=URL, api_key="none", api_version="2024-10-21")
usual = {"model": "talker", "messages": ASK, "temperature": 0, "max_tokens": 12}


def failure(call):
    try:
        call()
    except openai.APIStatusError as error:
        return f"{type(error).__name__} {error.code}"


def streamed():
    chunks = client.chat.completions.create(**usual, stream=True, stream_options={"include_usage": True})
    return "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)


def responded():
    events = client.responses.create(
        model="talker", input=ASK, temperature=0, max_output_tokens=12, stream=True, store=False
    )
    return "".join(event.delta for event in events if event.type == "response.output_text.delta")


found = {
    "chat": client.chat.completions.create(**usual).choices[0].message.content,
    "stream": streamed(),
    "response": client.responses.create(model="talker", input=ASK, temperature=0, max_output_tokens=12).output_text,
    "responses stream": responded(),
    "embedding": f"{len(client.embeddings.create(model='embedder', input='Hi').data[0].embedding)} numbers",
    "unknown model": failure(lambda: client.chat.completions.create(**usual | {"model": "nobody"})),
    "too long": failure(
        lambda: client.chat.completions.create(**usual | {"messages": [{"role": "user", "content": "hello " * 20_000}]})
    ),
    "models": ", ".join(model.id for model in client.models.list()),
    "azure": azure.chat.completions.create(**usual).choices[0].message.content,
}
print(json.dumps(found))
