"""What a picture shows; it is in the request. From the web, engine_args `allowed_media_domains` must name the host."""

import base64
import sys
from pathlib import Path

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
picture = base64.b64encode(Path(sys.argv[1]).read_bytes()).decode()
answer = client.chat.completions.create(
    model="eyes",
    messages=[
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "What is it?"},
                {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
            ],
        }
    ],
    max_tokens=8,
)
print("tokens of the question:", answer.usage.prompt_tokens if answer.usage else 0)
