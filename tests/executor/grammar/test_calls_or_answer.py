"""tools beside response_format: the grammar takes one or the other, on both backends."""

from __future__ import annotations

import pytest

from sapwood.executor.grammar.interface import GrammarBackend
from sapwood.frontends.serving.tools import Tool, ToolUse
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Grammar
from sapwood.text.tools.qwen25 import Qwen25

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
ANSWER = {
    "type": "object",
    "properties": {"n": {"type": "integer"}},
    "required": ["n"],
    "additionalProperties": False,
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
CONTENTS = {
    "json_schema": (grammars.json_schema(ANSWER), '{"n": 3}'),
    "regex": (grammars.regex("[0-9]+"), "365"),
    "choice": (grammars.choice(["yes", "no"]), "no"),
}


@pytest.mark.parametrize("kind", sorted(CONTENTS))
@pytest.mark.parametrize("parallel", [True, False])
def test_an_answer_or_calls(backend: GrammarBackend, accepts, kind: str, parallel: bool) -> None:
    content, answer = CONTENTS[kind]
    use = ToolUse(tools=(Tool(name="weather", parameters=CITY, strict=True),), parallel=parallel)
    grammar = use.grammar(Qwen25(), frozenset(), content)
    assert isinstance(grammar, Grammar)
    compiled = backend.compile(grammar)
    assert accepts(compiled, answer)
    assert accepts(compiled, CALL)
    assert accepts(compiled, f"{CALL}\n{CALL}") is parallel
    assert not accepts(compiled, "It rains.")
    assert not accepts(compiled, f"{answer}\n{CALL}")
    assert not accepts(compiled, CALL.replace("Rome", "Ro\nme"))
    assert not accepts(compiled, CALL.replace('"city"', '"town"'))
