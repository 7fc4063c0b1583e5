"""messages.create, stream, parse, tools and count_tokens of the official SDK."""

import os

from anthropic import Anthropic
from pydantic import BaseModel

QUESTION = [{"role": "user", "content": "What is the capital of Japan?"}]
MODEL = "smollm2-135m"


class City(BaseModel):
    name: str
    is_capital: bool


TOOL = {
    "name": "weather",
    "description": "The weather of a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 20}},
        "required": ["city"],
    },
}

client = Anthropic(base_url=os.environ["CHAT_URL"], api_key="none")
answer = client.messages.create(model=MODEL, max_tokens=30, messages=QUESTION)
assert "Tokyo" in answer.content[0].text
with client.messages.stream(model=MODEL, max_tokens=30, messages=QUESTION) as stream:
    assert "Tokyo" in "".join(stream.text_stream)
parsed = client.messages.parse(model=MODEL, max_tokens=60, messages=QUESTION, output_format=City)
assert isinstance(parsed.parsed_output, City)
called = client.messages.create(
    model=MODEL,
    max_tokens=80,
    messages=QUESTION,
    tools=[TOOL],
    tool_choice={"type": "any", "disable_parallel_tool_use": True},
)
[call] = [block for block in called.content if block.type == "tool_use"]
assert call.name == "weather"
result = {"type": "tool_result", "tool_use_id": call.id, "content": "sunny"}
followed = client.messages.create(
    model=MODEL,
    max_tokens=20,
    tools=[TOOL],
    messages=[
        *QUESTION,
        {"role": "assistant", "content": called.content},
        {"role": "user", "content": [result]},
    ],
)
assert followed.stop_reason in ("end_turn", "max_tokens", "tool_use")
counted = client.messages.count_tokens(model=MODEL, messages=QUESTION)
assert counted.input_tokens == answer.usage.input_tokens + answer.usage.cache_read_input_tokens
assert client.models.list().data[0].id == MODEL
