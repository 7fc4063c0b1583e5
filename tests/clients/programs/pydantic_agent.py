"""Agents over chat completions and over responses: text, a typed answer, a stream."""

import asyncio
import os

from pydantic import BaseModel
from pydantic_ai import Agent, NativeOutput
from pydantic_ai.models.openai import OpenAIChatModel, OpenAIResponsesModel
from pydantic_ai.providers.openai import OpenAIProvider

QUESTION = "What is the capital of Japan?"


class City(BaseModel):
    name: str
    is_capital: bool


provider = OpenAIProvider(base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
model = OpenAIChatModel("smollm2-135m", provider=provider)
limit = {"max_tokens": 80}
assert "Tokyo" in Agent(model).run_sync(QUESTION, model_settings=limit).output
for wanted in (City, NativeOutput(City)):
    typed = Agent(model, output_type=wanted).run_sync(QUESTION, model_settings=limit)
    assert isinstance(typed.output, City)
responses = OpenAIResponsesModel("smollm2-135m", provider=provider)
assert "Tokyo" in Agent(responses).run_sync(QUESTION, model_settings=limit).output


async def streamed() -> str:
    async with Agent(model).run_stream(QUESTION, model_settings=limit) as result:
        return await result.get_output()


assert "Tokyo" in asyncio.run(streamed())
