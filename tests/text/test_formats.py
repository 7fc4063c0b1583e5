"""Which parsers a model gets."""

from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.text.formats import AnswerFormats
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.template import ChatTemplate, built_in_names, template_source

SHOWS_TOOLS = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}"
QWEN3 = SHOWS_TOOLS + "<tool_call>{{ messages[0].content.split('</think>')[-1] }}"


def of(calls="auto", reasoning="auto", template=None, **others):
    return AnswerFormats.of_model(
        tool_call_parser=calls,
        reasoning_parser=reasoning,
        template=None if template is None else ChatTemplate(template),
        **others,
    )


def test_auto_reads_both_off_the_template():
    formats = of(template=QWEN3)
    assert formats.calls.name == "qwen25"
    assert formats.reasoning is REASONING_FORMATS.get("qwen3")
    assert not formats.tells_tools_in_text
    assert [str(decision) for decision in formats.decisions] == [
        "tool_call_parser = qwen25 (the chat template shows calls in this format)",
        "reasoning_parser = qwen3 (the chat template shows thinking in this format)",
    ]


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[0].content }}", "the chat template has no place for tools"),
        # A format alone does not tell the model its tools.
        ("{{ messages[0].content }}<tool_call>", "the chat template has no place for tools"),
        (SHOWS_TOOLS, "the chat template shows calls in no format that is known here"),
    ],
)
def test_auto_takes_the_generic_format_where_the_template_does_not_help(template, why):
    formats = of(template=template)
    assert formats.calls.name == "generic"
    assert formats.tells_tools_in_text
    assert formats.reasoning is None
    assert [str(decision) for decision in formats.decisions] == [
        f"tool_call_parser = generic ({why})",
        "reasoning_parser = none (the chat template shows no thinking)",
    ]


def test_without_a_template_there_is_nothing_to_decide():
    formats = of(template=None)
    assert (formats.calls, formats.reasoning, formats.decisions) == (None, None, ())


def test_none_is_a_choice():
    formats = of("none", "none", template=QWEN3)
    assert (formats.calls, formats.reasoning, formats.decisions) == (None, None, ())


def test_names_go_before_the_template():
    formats = of("mistral", "kimi", template=QWEN3, keeps_unknown=True)
    assert formats.calls.name == "mistral"
    assert formats.reasoning is REASONING_FORMATS.get("kimi")
    assert formats.keeps_unknown
    assert formats.decisions == ()
    assert of("generic", template=QWEN3).tells_tools_in_text


def test_mimo_is_told_from_qwen3_coder_by_its_architecture():
    template = SHOWS_TOOLS + "<function=x>"
    assert of(template=template).calls.name == "qwen3_coder"
    assert of(template=template, architectures=("MiMoForCausalLM",)).calls.name == "mimo"


@pytest.mark.parametrize("given", [{"calls": "nope"}, {"reasoning": "nope"}])
def test_unknown_names_are_refused(given):
    with pytest.raises(ConfigError, match="nope"):
        of(**given)


def test_the_built_in_templates():
    found = {name: of(template=template_source(name)) for name in built_in_names()}
    assert found.pop("chatml-tools").calls.name == "qwen25"
    deepseek = found.pop("deepseek-v3.2")
    assert deepseek.calls.name == "deepseekv32"
    assert deepseek.reasoning is not None
    assert {one.calls.name for one in found.values()} == {"generic"}
    assert all(one.reasoning is None for one in found.values())
