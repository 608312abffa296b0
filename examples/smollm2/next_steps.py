"""Prints what to do after the demo."""

from llmrun.settings import Settings

URL = Settings().resolved_url()

print(f"""
The endpoint for any OpenAI client is {URL}/v1:

  curl {URL}/v1/chat/completions -H 'Content-Type: application/json' \\
    -d '{{"model": "smollm2", "messages": [{{"role": "user", "content": "Hello!"}}]}}'

  from openai import OpenAI
  client = OpenAI(base_url="{URL}/v1", api_key="none")
  print(client.chat.completions.create(
      model="smollm2", messages=[{{"role": "user", "content": "Hello!"}}]
  ).choices[0].message.content)

After five minutes without a request the model scales to zero; the next request starts it again.
  .venv/bin/llmrun status      show the deployed models
  just stop                    stop the cluster
""")
