"""outlines by its OpenAI and vLLM backends: JSON, choices, a regular expression, a grammar."""

import os

import openai
import outlines
from outlines.types import CFG, Regex
from pydantic import BaseModel

MODEL = "smollm2-135m"


class City(BaseModel):
    name: str
    is_capital: bool


client = openai.OpenAI(base_url=f"{os.environ['CHAT_URL']}/v1", api_key="none")
by_openai = outlines.from_openai(client, MODEL)
assert "Tokyo" in by_openai("What is the capital of Japan?", max_tokens=30)
City.model_validate_json(by_openai("Tell of Paris.", City, max_tokens=60))
assert "".join(by_openai.stream("Name a tree.", max_tokens=8))

by_vllm = outlines.from_vllm(client, MODEL)
assert "Tokyo" in by_vllm("What is the capital of Japan?", max_tokens=30)
City.model_validate_json(by_vllm("Tell of Paris.", City, max_tokens=60))
assert by_vllm("A date, please.", Regex(r"\d{4}-\d{2}"), max_tokens=20)[4] == "-"
grammar = CFG('root ::= "yes" | "no"')
assert by_vllm("Is Paris a city?", grammar, max_tokens=5) in ("yes", "no")
