# ruff: noqa: RUF001 - the wide bars are the format's own
"""The prompts of DeepSeek V3.2, as the code that comes with the model writes them."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.text.formats import AnswerFormats
from sapwood.text.template import ChatTemplate, template_source
from sapwood.text.tokenizer import Tokenizer

TEMPLATE = ChatTemplate(template_source("deepseek-v3.2"))
BEGIN, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
END = "<｜end▁of▁sentence｜>"
TOOLS: list[dict[str, Any]] = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
    for name in ("weather", "clock")
]
CALLS = [
    {
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Ulm", "days": [1, 2], "é": null}'},
    },
    {"type": "function", "function": {"name": "clock", "arguments": "{}"}},
]
WRITTEN = """

<｜DSML｜function_calls>
<｜DSML｜invoke name="weather">
<｜DSML｜parameter name="city" string="true">Ulm</｜DSML｜parameter>
<｜DSML｜parameter name="days" string="false">[1, 2]</｜DSML｜parameter>
<｜DSML｜parameter name="é" string="false">null</｜DSML｜parameter>
</｜DSML｜invoke>
<｜DSML｜invoke name="clock">
</｜DSML｜invoke>
</｜DSML｜function_calls>"""


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def test_thinking_before_the_last_question_is_left_out() -> None:
    """The model card's example."""
    messages = [
        user("hello"),
        answer("Hello! I am DeepSeek.", reasoning_content="thinking..."),
        user("1+1=?"),
    ]
    first = f"{BEGIN}{USER}hello{ASSISTANT}</think>Hello! I am DeepSeek.{END}{USER}1+1=?{ASSISTANT}"
    assert TEMPLATE.render(messages, thinking=True) == f"{first}<think>"
    assert TEMPLATE.render(messages, enable_thinking=True) == f"{first}<think>"
    assert TEMPLATE.render(messages) == f"{first}</think>"
    assert TEMPLATE.render(messages, add_generation_prompt=False) == first.removesuffix(ASSISTANT)


def test_tools_stand_behind_the_system_message() -> None:
    system = {"role": "system", "content": "Be short."}
    prompt = TEMPLATE.render([system, user("Hi")], tools=TOOLS)
    assert prompt.startswith(f"{BEGIN}Be short.\n\n## Tools\n\nYou have access")
    schemas = "\n".join(
        f'{{"name": "{name}", "parameters": {{"type": "object"}}}}' for name in ("weather", "clock")
    )
    assert prompt.endswith(
        "in JSONSchema format:\n<functions>\n" + schemas + "\n</functions>\n"
        f"{USER}Hi{ASSISTANT}</think>"
    )
    assert '\n<｜DSML｜invoke name="$FUNCTION_NAME">\n<｜DSML｜parameter name="$PAR' in prompt
    alone = TEMPLATE.render([user("Hi")], tools=TOOLS)
    assert alone == prompt.replace("Be short.", "")
    assert TEMPLATE.places.tools
    assert not TEMPLATE.places.tools_need_system


@pytest.mark.parametrize("thinking", [False, True])
def test_calls_and_their_results(thinking: bool) -> None:
    messages = [
        user("Weather?"),
        answer("", reasoning_content="Ask.", tool_calls=CALLS),
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "noon"},
    ]
    opened = "<think>" if thinking else "</think>"
    thought = "Ask.</think>" if thinking else ""
    results = "\n\n<function_results>\n<result>rain</result>\n<result>noon</result>\n"
    expected = f"{BEGIN}{USER}Weather?{ASSISTANT}{opened}{thought}{WRITTEN}{END}{results}"
    prompt = TEMPLATE.render(messages, thinking=thinking)
    assert prompt == f"{expected}</function_results>\n\n{opened}"


def test_an_answer_goes_on() -> None:
    messages = [user("Count."), answer("One, ")]
    prompt = TEMPLATE.render(messages, continue_final_message=True, add_generation_prompt=False)
    assert prompt == f"{BEGIN}{USER}Count.{ASSISTANT}</think>One, "
    thinking = TEMPLATE.render(
        messages, continue_final_message=True, add_generation_prompt=False, thinking=True
    )
    assert thinking == f"{BEGIN}{USER}Count.{ASSISTANT}<think></think>One, "


def test_roles_that_it_lacks_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="not critic"):
        TEMPLATE.render([user("Hi"), {"role": "critic", "content": "No"}])


def test_answers_are_read_as_they_are_written() -> None:
    formats = AnswerFormats.of_model(
        tool_call_parser="auto", reasoning_parser="auto", template=TEMPLATE
    )
    assert formats.calls is not None
    assert formats.calls.name == "deepseekv32"
    assert formats.reasoning is not None


def test_the_architecture_has_this_template(byte_level_tokenizer: Tokenizer) -> None:
    named = ("DeepseekV32ForCausalLM",)
    found = ChatTemplate.of_model(byte_level_tokenizer, architectures=named)
    assert found is not None
    assert found.source == TEMPLATE.source
    assert ChatTemplate.of_model(byte_level_tokenizer, architectures=("LlamaForCausalLM",)) is None
    chosen = ChatTemplate.of_model(byte_level_tokenizer, override="zephyr", architectures=named)
    assert chosen is not None
    assert chosen.source != TEMPLATE.source
