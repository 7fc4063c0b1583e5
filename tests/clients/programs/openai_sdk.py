"""chat, streams, tools, parse, completions, embeddings and responses of the official SDK."""

import os

from openai import OpenAI
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
MODEL = "smollm2-135m"


class City(BaseModel):
    name: str
    is_capital: bool


TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 20}},
            "required": ["city"],
        },
    },
}

client = OpenAI(base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
assert client.models.list().data[0].id == MODEL
answer = client.chat.completions.create(model=MODEL, messages=QUESTION, max_completion_tokens=30)
assert "Tokyo" in answer.choices[0].message.content

stream = client.chat.completions.create(
    model=MODEL, messages=QUESTION, stream=True, stream_options={"include_usage": True}
)
chunks = list(stream)
assert "Tokyo" in "".join(one.choices[0].delta.content or "" for one in chunks if one.choices)
assert chunks[-1].usage.completion_tokens > 0

parsed = client.chat.completions.parse(
    model=MODEL, messages=QUESTION, response_format=City, max_tokens=60
)
assert isinstance(parsed.choices[0].message.parsed, City)

called = client.chat.completions.create(
    model=MODEL, messages=QUESTION, tools=[TOOL], tool_choice="required", max_tokens=80
)
assert called.choices[0].message.tool_calls[0].function.name == "weather"

assert client.completions.create(model=MODEL, prompt="Water boils at", max_tokens=4).choices[0].text

response = client.responses.create(model=MODEL, input="What is the capital of Japan?")
assert "Tokyo" in response.output_text
followed = client.responses.create(
    model=MODEL, input="And of Italy?", previous_response_id=response.id, max_output_tokens=20
)
assert followed.output_text
typed = client.responses.parse(
    model=MODEL, input="Paris", text_format=City, max_output_tokens=60, truncation="auto"
)
assert isinstance(typed.output_parsed, City)
with client.responses.stream(model=MODEL, input="Name a tree.", max_output_tokens=10) as events:
    kinds = [event.type for event in events]
assert kinds[0] == "response.created"
assert "response.output_text.delta" in kinds

embedder = OpenAI(base_url=f"{os.environ['EMBEDDING_URL']}/v1", api_key="none")
made = embedder.embeddings.create(model="all-minilm-l6-v2", input=["a cat", "a kitten"])
assert [len(one.embedding) for one in made.data] == [384, 384]
