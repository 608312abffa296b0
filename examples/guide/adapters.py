"""Lists the LoRA adapters of the model `adapted`, and sends a request to each of them."""

from openai import OpenAI

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
for model in client.models.list():
    if model.id.startswith("adapted"):
        answer = client.completions.create(model=model.id, prompt="Once upon a time", max_tokens=8, temperature=0)
        print(f"{model.id}: {answer.choices[0].text!r}")
