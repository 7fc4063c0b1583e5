"""ChatOpenAI: invoke, stream, tools, structured output; OpenAIEmbeddings."""

import os

from langchain_core.tools import tool
from langchain_openai import ChatOpenAI, OpenAIEmbeddings
from pydantic import BaseModel

MODEL = "smollm2-135m"
QUESTION = "What is the capital of Japan?"


class City(BaseModel):
    """A city."""

    name: str
    is_capital: bool


@tool
def weather(city: str) -> str:
    """The weather of a city."""
    return f"sunny in {city}"


chat = ChatOpenAI(model=MODEL, base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
assert "Tokyo" in chat.invoke(QUESTION).content
assert "Tokyo" in "".join(chunk.content for chunk in chat.stream(QUESTION))
for method in ("json_schema", "function_calling"):
    typed = chat.with_structured_output(City, method=method).bind(max_tokens=80)
    assert isinstance(chat.with_structured_output(City, method=method).invoke(QUESTION), City)
called = chat.bind_tools([weather], tool_choice="weather").invoke(QUESTION, max_tokens=80)
assert called.tool_calls[0]["name"] == "weather"
by_responses = ChatOpenAI(
    model=MODEL, base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none", use_responses_api=True
)
assert "Tokyo" in by_responses.invoke(QUESTION).text
embedder = OpenAIEmbeddings(
    model="all-minilm-l6-v2",
    base_url=f"{os.environ['EMBEDDING_URL']}/v1",
    api_key="none",
    check_embedding_ctx_length=False,
)
assert len(embedder.embed_query("a cat")) == 384
