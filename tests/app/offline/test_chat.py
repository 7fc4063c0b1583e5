"""Tools and thinking from a Python program, on a tiny model that is held to a grammar."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from sapwood import LLM, SamplingParams
from sapwood.app.offline.chat import chat_turn
from sapwood.base.errors import InvalidRequest

MakeLLM = Callable[..., LLM]
MESSAGES = [{"role": "user", "content": "Hi"}]
SAMPLING = {"temperature": 1.0, "seed": 1, "max_new_tokens": 200}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "parameters": {
                "type": "object",
                "properties": {"way": {"enum": ["up", "down"]}},
                "required": ["way"],
                "additionalProperties": False,
            },
        },
    }
    for name in ("go", "look")
]


@pytest.fixture(scope="module")
def llm(make_shared_llm: MakeLLM) -> LLM:
    return make_shared_llm(
        chat_template="{% for t in tools or [] %}{{ t.function.name }}{% endfor %}:"
    )


@pytest.fixture(scope="module")
def thinker(make_shared_llm: MakeLLM) -> LLM:
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return make_shared_llm(chat_template=template, reasoning_parser="qwen3")


@pytest.mark.parametrize("seed", range(5))
def test_a_required_call_is_a_call(llm: LLM, seed: int) -> None:
    sampling = {**SAMPLING, "seed": seed, "logit_bias": _no_space(llm)}
    [result] = llm.chat(
        MESSAGES, sampling, tools=TOOLS, tool_choice="required", parallel_tool_calls=False
    )
    assert result.finish.kind == "stop"
    assert result.answer is not None
    [call] = result.answer.calls
    assert call.name in ("go", "look")
    assert json.loads(call.arguments)["way"] in ("up", "down")
    assert result.answer.content == ""


def test_the_named_tool_is_called(llm: LLM) -> None:
    choice = {"type": "function", "function": {"name": "look"}}
    sampling = {**SAMPLING, "logit_bias": _no_space(llm)}
    [result] = llm.chat(MESSAGES, sampling, tools=TOOLS, tool_choice=choice)
    assert result.answer is not None
    assert [call.name for call in result.answer.calls] == ["look"]


@pytest.mark.parametrize("budget", [0, 1, 7])
def test_a_thinking_budget_ends_the_thinking(thinker: LLM, budget: int) -> None:
    messages = [*MESSAGES, {"role": "assistant", "content": "<think>"}]
    sampling = {**SAMPLING, "max_new_tokens": 40, "ignore_eos": True}
    [result] = thinker.chat(messages, sampling, continue_final_message=True, thinking_budget=budget)
    closing = thinker.services.tokenizer.encode("\n</think>", False)
    assert list(result.token_ids[budget : budget + len(closing)]) == closing
    assert result.num_output_tokens == 40


def test_tools_of_a_template_without_a_place_for_them(make_llm: MakeLLM) -> None:
    llm = make_llm(chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")
    arguments = {"way": "up"}
    history = [
        *MESSAGES,
        {
            "role": "assistant",
            "tool_calls": [{"id": "1", "function": {"name": "go", "arguments": arguments}}],
        },
        {"role": "tool", "tool_call_id": "1", "content": "gone"},
    ]
    prompt = chat_turn(llm.services, history, SamplingParams(), {"tools": TOOLS}).prompt
    assert '{"name": "look"' in prompt
    assert '<tool_call>[{"name": "go", "arguments": {"way": "up"}}]</tool_call>' in prompt
    assert "The function go returned:\ngone" in prompt


def test_options_that_are_wrong_are_named(llm: LLM) -> None:
    for options, param in (
        ({"tool_choice": "required"}, "tool_choice"),
        ({"max_tokens": 4}, r'max_tokens is a sampling parameter.*"max_new_tokens"'),
        ({"temperature": 0}, r'chat\(messages, {"temperature"'),
        ({"tools": [{"type": "function"}]}, r"tools\[0\].function"),
    ):
        with pytest.raises(InvalidRequest, match=param):
            llm.chat(MESSAGES, SAMPLING, **options)


def test_the_text_of_a_chat_without_tools_is_its_content(llm: LLM) -> None:
    [result] = llm.chat(MESSAGES, {"temperature": 0, "max_new_tokens": 8})
    assert result.answer is not None
    assert result.answer.content == result.text
    [plain] = llm.generate("Hi", {"max_new_tokens": 1})
    assert plain.answer is None


def _no_space(llm: LLM) -> dict[int, float]:
    """White space between the parts of JSON has no end for a random model."""
    return {llm.services.tokenizer.encode(one, False)[0]: -100.0 for one in " \n\t\r"}
