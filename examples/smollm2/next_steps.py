"""Prints how to go on after the demo."""

from llmrun.settings import Settings

URL = Settings().resolved_url()

print(f"""
The endpoint is {URL}/v1, for any OpenAI client:

  curl {URL}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "smollm2", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{URL}/v1", api_key="none")
  print(client.chat.completions.create(
      model="smollm2", messages=[{{"role": "user", "content": "Hello!"}}]
  ).choices[0].message.content)

After five minutes without a request it takes no memory; the next request wakes it.
  .venv/bin/llmrun status      what runs
  just stop                    end all of it
""")
