"""Sends an image in a request. For an image URL, engine_args `allowed_media_domains` must include its host."""

import base64
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
image = base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()
answer = client.chat.completions.create(
    model="eyes",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{image}"}},
            ],
        }
    ],
    max_tokens=8,
)
print("prompt tokens:", answer.usage.prompt_tokens if answer.usage else 0)
