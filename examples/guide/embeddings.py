"""Finds the text that is closest to a query: with embeddings, and with `/rerank`."""

import math
import os

import httpx
from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
query, texts = "a small town", ["the theory of numbers", "a little village"]

target, *others = (row.embedding for row in client.embeddings.create(model="vectors", input=[query, *texts]).data)
print("nearest:", min(zip(others, texts, strict=True), key=lambda pair: math.dist(target, pair[0]))[1])

url = os.environ["OPENAI_BASE_URL"].removesuffix("/v1")
body = {"model": "vectors", "query": query, "documents": texts}
ranked = httpx.post(f"{url}/rerank", json=body, timeout=60).raise_for_status().json()["results"]
print("first:", texts[ranked[0]["index"]])
