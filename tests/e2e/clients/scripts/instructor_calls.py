"""Calls of instructor. Prints their results as JSON."""

import json
import sys

import instructor
import openai
from pydantic import BaseModel


class Capital(BaseModel):
    city: str


client = instructor.from_openai(
    openai.OpenAI(base_url=f"{sys.argv[1]}/v1", api_key="none"), mode=instructor.Mode.JSON_SCHEMA
)
ask = [{"role": "user", "content": "Name the capital of France."}]
capital = client.chat.completions.create(
    model="talker", response_model=Capital, messages=ask, temperature=0, max_tokens=40
)
print(json.dumps({"structured": str(capital)}))
