"""Calls a tool by name, and lets the model decide with "auto"."""

from openai import OpenAI
from openai.types.chat import ChatCompletionToolParam

client = OpenAI()  # OPENAI_BASE_URL=http://127.0.0.1:8000/v1 OPENAI_API_KEY=none
parameters: dict[str, object] = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}},
    "required": ["city"],
}
weather: ChatCompletionToolParam = {
    "type": "function",
    "function": {"name": "weather", "description": "The weather in a city.", "parameters": parameters},
}

named = client.chat.completions.create(
    model="talker",
    messages=[{"role": "user", "content": "How is the weather in Paris?"}],
    tools=[weather],
    tool_choice={"type": "function", "function": {"name": "weather"}},
    temperature=0,
    max_tokens=100,
)
for call in named.choices[0].message.tool_calls or ():
    print("named:", call.to_dict())

auto = client.chat.completions.create(
    model="talker",
    messages=[{"role": "user", "content": "How is the weather in Paris?"}],
    tools=[weather],
    tool_choice="auto",
    temperature=0,
    max_tokens=20,
)
print("auto:", auto.choices[0].finish_reason)
