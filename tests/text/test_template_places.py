"""Whether a template shows tools and a system message."""

from __future__ import annotations

import pytest

from sapwood.base.errors import UnsupportedFeature
from sapwood.text.template import ChatTemplate, built_in_names, template_source
from tests.text import chat_templates as families

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
USER = {"role": "user", "content": "Weather?"}
TOOLS = [{"type": "function", "function": {"name": "get_weather", "parameters": {}}}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, special_tokens=SPECIAL)


@pytest.mark.parametrize("family", families.WITHOUT_PLACE)
def test_templates_without_a_place_for_tools(family):
    one = template(families.WITHOUT_PLACE[family])
    assert not one.places.tools
    with pytest.raises(UnsupportedFeature, match=r"no place for tools.*--tool-call-parser generic"):
        one.render([USER], tools=TOOLS)


@pytest.mark.parametrize("family", families.WITH_PLACE)
def test_templates_with_a_place_for_tools(family):
    one = template(families.WITH_PLACE[family])
    assert one.places.tools
    messages = [USER, {"role": "assistant", "content": "Sunny."}] * 5 + [USER]
    assert "get_weather" in one.render(messages, tools=TOOLS)


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        (families.SMOLLM2, True),
        (families.LLAMA_2, True),
        (families.ONLY_PARTS, True),
        (families.GEMMA_2, False),
        (families.MISTRAL_7B, False),
        (families.DROPS_SYSTEM, False),
        (families.MISTRAL_TOOLS, False),
        # Nothing can be told of it, so requests are rendered as they are.
        (families.ONLY_LONG_CHATS, True),
    ],
)
def test_whether_a_system_message_is_shown(source, shown):
    assert template(source).places.system is shown


def test_a_system_message_is_added_where_tools_need_one():
    one = template(families.SYSTEM_HAS_TOOLS)
    assert one.places.tools_need_system
    rendered = one.render([USER], tools=TOOLS)
    assert rendered.startswith("<|system|>")
    assert "get_weather" in rendered
    given = [{"role": "system", "content": "Be brief."}, USER]
    assert one.render(given, tools=TOOLS).startswith("<|system|>Be brief.")
    assert one.render([USER]) == "<|user|>Weather?"
    assert not template(families.QWEN).places.tools_need_system


def test_a_models_second_template_is_the_one_for_tools():
    both = ChatTemplate(families.SMOLLM2, tool_source=families.QWEN)
    assert both.places.tools
    assert not ChatTemplate(families.QWEN, tool_source=families.SMOLLM2).places.tools


@pytest.mark.parametrize("name", built_in_names())
def test_the_built_in_templates(name):
    places = ChatTemplate(template_source(name)).places
    assert places.tools is (name in ("chatml-tools", "deepseek-v3.2"))
    assert places.system
