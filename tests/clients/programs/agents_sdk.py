"""openai-agents over chat completions and over responses, with a tool and a typed answer."""

import asyncio
import os

from agents import (
    Agent,
    ModelSettings,
    OpenAIChatCompletionsModel,
    OpenAIResponsesModel,
    Runner,
    function_tool,
    set_tracing_disabled,
)
from openai import AsyncOpenAI
from pydantic import BaseModel

QUESTION = "What is the capital of Japan?"


class City(BaseModel):
    name: str
    is_capital: bool


@function_tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


async def main() -> None:
    set_tracing_disabled(True)
    client = AsyncOpenAI(base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
    settings = ModelSettings(max_tokens=80)
    for kind in (OpenAIChatCompletionsModel, OpenAIResponsesModel):
        model = kind(model="smollm2-135m", openai_client=client)
        plain = Agent(name="plain", model=model, model_settings=settings)
        assert "Tokyo" in (await Runner.run(plain, QUESTION)).final_output
        typed = Agent(name="typed", model=model, model_settings=settings, output_type=City)
        assert isinstance((await Runner.run(typed, QUESTION)).final_output, City)
        must = ModelSettings(max_tokens=80, tool_choice="required")
        armed = Agent(name="armed", model=model, model_settings=must, tools=[weather])
        result = await Runner.run(armed, "What is the weather in Paris?", max_turns=4)
        assert any(item.type == "tool_call_output_item" for item in result.new_items)
        streamed = Runner.run_streamed(plain, QUESTION)
        events = [event async for event in streamed.stream_events()]
        assert events
        assert "Tokyo" in streamed.final_output


asyncio.run(main())
