"""Structured output: a pydantic class, a bare JSON schema as in Ray Serve LLM's guide, a choice, a regex."""

import json
from typing import Literal

from openai import OpenAI
from pydantic import BaseModel, Field

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none


class Capital(BaseModel):
    city: str = Field(max_length=20)
    continent: Literal["Europe", "Asia", "Africa"]


question = "Which city is the capital of France?"
parsed = client.chat.completions.parse(
    model="talker",
    messages=[{"role": "user", "content": question}],
    response_format=Capital,
    temperature=0,
    max_tokens=60,
)
print("parsed:", parsed.choices[0].message.parsed)

bare = client.chat.completions.create(
    model="talker",
    messages=[{"role": "user", "content": question}],
    extra_body={"response_format": {"type": "json_schema", "json_schema": Capital.model_json_schema()}},
    temperature=0,
    max_tokens=60,
)
print("bare:", json.loads(bare.choices[0].message.content or "")["continent"])

for constraint in ({"choice": ["yes", "no"]}, {"regex": "[a-z]{3}-[0-9]{2}"}):
    answer = client.chat.completions.create(
        model="talker",
        messages=[{"role": "user", "content": question}],
        extra_body={"structured_outputs": constraint},
        temperature=0,
        max_tokens=20,
    )
    print("structured:", answer.choices[0].message.content)
