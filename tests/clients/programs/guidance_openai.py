"""guidance by its OpenAI backend and by its experimental vLLM one."""

import os

import guidance
from guidance import assistant, gen, user
from guidance.models import OpenAI
from guidance.models.experimental import VLLMModel

MODEL = "smollm2-135m"
BASE = f"{os.environ['CHAT_URL']}/v1"
SCHEMA = {
    "type": "object",
    "properties": {"name": {"type": "string", "maxLength": 20}},
    "required": ["name"],
    "additionalProperties": False,
}

model = OpenAI(MODEL, base_url=BASE, api_key="none", echo=False)
with user():
    model += "What is the capital of Japan?"
with assistant():
    model += gen("answer", max_tokens=30)
assert "Tokyo" in model["answer"]

typed = OpenAI(MODEL, base_url=BASE, api_key="none", echo=False)
with user():
    typed += "Tell of Paris."
with assistant():
    typed += guidance.json("city", schema=SCHEMA, max_tokens=60)
assert typed["city"].startswith("{")

by_vllm = VLLMModel(MODEL, base_url=BASE, api_key="none", echo=False)
with user():
    by_vllm += "Is Paris a city?"
with assistant():
    by_vllm += guidance.select(["yes", "no"], name="choice")
assert by_vllm["choice"] in ("yes", "no")
with user():
    by_vllm += "A number of two digits?"
with assistant():
    by_vllm += gen("number", regex=r"\d\d")
assert by_vllm["number"].isdigit()
