"""Typed answers by tools, by JSON Schema and by JSON, and a partial stream."""

import os

import instructor
import openai
from pydantic import BaseModel, Field


class City(BaseModel):
    name: str = Field(max_length=20)
    is_capital: bool


QUESTION = [{"role": "user", "content": "Tell of Paris."}]
base = openai.OpenAI(base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
for mode in (instructor.Mode.TOOLS, instructor.Mode.JSON_SCHEMA, instructor.Mode.JSON):
    client = instructor.from_openai(base, mode=mode)
    asked = {"model": "smollm2-135m", "messages": QUESTION, "max_tokens": 100}
    if mode is not instructor.Mode.JSON:  # its "any JSON object" leaves the fields to the model
        assert isinstance(client.chat.completions.create(response_model=City, **asked), City), mode
client = instructor.from_openai(base, mode=instructor.Mode.TOOLS)
parts = list(client.chat.completions.create_partial(response_model=City, **asked))
assert parts[-1].name is not None
