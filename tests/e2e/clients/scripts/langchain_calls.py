"""Calls of LangChain. Prints their results as JSON."""

import json
import sys

import openai
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

ASK = "Name the capital of France."
usual = {"base_url": f"{sys.argv[1]}/v1", "api_key": "none"}
chat = ChatOpenAI(model="talker", temperature=0, max_tokens=40, **usual)


class Capital(BaseModel):
    city: str


def failure():
    try:
        ChatOpenAI(model="nobody", **usual).invoke(ASK)
    except openai.APIStatusError as error:
        return type(error).__name__


embeddings = OpenAIEmbeddings(model="embedder", check_embedding_ctx_length=False, **usual)
found = {
    "chat": chat.invoke(ASK).content,
    "stream": "".join(chunk.content for chunk in chat.stream(ASK)),
    "structured": str(chat.with_structured_output(Capital, method="json_schema").invoke(ASK)),
    "embedding": f"{len(embeddings.embed_query('Hi'))} numbers",
    "unknown model": failure(),
}
print(json.dumps(found))
