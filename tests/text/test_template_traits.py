"""Reading off a template what it expects of the messages."""

from __future__ import annotations

import pytest
from jinja2 import Environment

from sapwood.text.template_traits import TemplateTraits, traits_of

MESSAGES = "{% for message in messages %}"
END = "{% endfor %}"


def traits(source: str) -> TemplateTraits:
    return traits_of(Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source))


@pytest.mark.parametrize(
    ("body", "form"),
    [
        ("{{ message['content'] }}", "text"),
        ("{{ message.content | trim }}", "text"),
        ("{% for word in message.content.split(' ') %}{{ word }}{% endfor %}", "text"),
        ("{% for c in message.tool_calls %}{{ c }}{% endfor %}{{ message.content }}", "text"),
        ("{% for part in message['content'] %}{{ part.text }}{% endfor %}", "parts"),
        ("{% for part in message.get('content') %}{{ part.text }}{% endfor %}", "parts"),
        ("{% set c = message.content %}{% for p in c %}{{ p.text }}{% endfor %}", "parts"),
        ("{% set c = message.content or [] %}{% for p in c %}{{ p.text }}{% endfor %}", "parts"),
        (
            "{% for p in message.content | selectattr('type', 'equalto', 'text') %}"
            "{{ p.text }}{% endfor %}",
            "parts",
        ),
        ("{{ message['content'][0]['text'] }}", "parts"),
        (
            "{% if message.content is string %}{{ message.content }}{% else %}"
            "{% for part in message.content %}{{ part.text }}{% endfor %}{% endif %}",
            "either",
        ),
    ],
)
def test_the_form_of_the_content(body: str, form: str):
    assert traits(MESSAGES + body + END).content == form


def test_a_macro_that_is_given_the_content_counts():
    macro = "{% macro show(value) %}{% for p in value %}{{ p.text }}{% endfor %}{% endmacro %}"
    assert traits(macro + MESSAGES + "{{ show(message.content) }}" + END).content == "parts"
    assert traits(macro + MESSAGES + "{{ show(message.other) }}" + END).content == "text"


@pytest.mark.parametrize(
    ("body", "as_text"),
    [
        ("{{ call.name + call['function']['arguments'] }}", True),
        ("{{ call.function.arguments }}", True),
        ("{{ call.function.arguments | tojson }}", False),
        ("{% set a = call.arguments %}{{ a | tojson }}", False),
        ("{% if call.arguments is string %}{{ call.arguments }}{% endif %}", False),
        ("{% for k, v in call.arguments.items() %}{{ k }}{% endfor %}", False),
        ("{% for k, v in call.arguments | items %}{{ k }}{% endfor %}", False),
        ("{{ call.function | tojson }}", False),
        ("{{ call.name }}", False),
    ],
)
def test_the_form_of_arguments(body: str, as_text: bool):
    source = MESSAGES + "{% for call in message.tool_calls %}" + body + END + END
    assert traits(source).arguments_as_text is as_text


def test_the_variables_that_come_from_outside():
    source = "{% if tools is defined %}{{ bos_token }}{% endif %}" + MESSAGES + END
    assert traits(source).variables == {"tools", "bos_token", "messages"}
