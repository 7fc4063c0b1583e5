"""Which parsers a model gets."""

from __future__ import annotations

import pytest

from sapwood.base.errors import ConfigError
from sapwood.text.formats import AnswerFormats
from sapwood.text.reasoning.registry import REASONING_FORMATS
from sapwood.text.template import built_in_names, template_source

QWEN3 = "<tool_call>\n{{ tool_call.name }} {{ content.split('</think>')[-1] }}"


def of(calls="auto", reasoning="auto", template=None, **others):
    return AnswerFormats.of_model(
        tool_call_parser=calls, reasoning_parser=reasoning, template=template, **others
    )


def test_auto_reads_both_off_the_template():
    formats = of(template=QWEN3)
    assert formats.calls.name == "qwen25"
    assert formats.reasoning is REASONING_FORMATS.get("qwen3")
    assert not formats.leaves_calls


def test_auto_finds_nothing_in_a_template_that_shows_nothing():
    for template in (None, "{{ messages }}"):
        formats = of(template=template)
        assert (formats.calls, formats.reasoning, formats.leaves_calls) == (None, None, False)


def test_none_is_a_choice():
    formats = of("none", "none", template=QWEN3)
    assert (formats.calls, formats.reasoning, formats.leaves_calls) == (None, None, True)


def test_names_go_before_the_template():
    formats = of("mistral", "kimi", template=QWEN3, keeps_unknown=True)
    assert formats.calls.name == "mistral"
    assert formats.reasoning is REASONING_FORMATS.get("kimi")
    assert formats.keeps_unknown


def test_mimo_is_told_from_qwen3_coder_by_its_architecture():
    template = "<function=x>"
    assert of(template=template).calls.name == "qwen3_coder"
    assert of(template=template, architectures=("MiMoForCausalLM",)).calls.name == "mimo"


@pytest.mark.parametrize("given", [{"calls": "nope"}, {"reasoning": "nope"}])
def test_unknown_names_are_refused(given):
    with pytest.raises(ConfigError, match="nope"):
        of(**given)


def test_the_built_in_templates():
    found = {name: of(template=template_source(name)) for name in built_in_names()}
    assert found["chatml-tools"].calls.name == "qwen25"
    assert all(one.reasoning is None for one in found.values())
