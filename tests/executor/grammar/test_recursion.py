import pytest

from sapwood.executor.grammar.recursion import may_repeat_itself
from sapwood.schema.grammar import Grammar


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("ebnf", 'root ::= "ab" root', True),
        ("ebnf", 'root ::= a\na ::= "x" b\nb ::= "y" a | "z"', True),
        ("ebnf", 'root ::= a a\na ::= "root" [root] b # root\nb ::= "\\" root"', False),
        ("ebnf", 'root ::= "a"{3} ("b" | "c")*', False),
        ("json_schema", '{"properties":{"a":{"$ref":"#"}},"required":["a"]}', True),
        ("json_schema", '{"properties":{"a":{"type":"string"}}}', False),
        ("regex", "(ab)+", False),
        ("choice", '["$ref"]', False),
    ],
)
def test_rules_that_lead_back_to_themselves(kind, text, expected):
    assert may_repeat_itself(Grammar(kind=kind, text=text)) is expected


def test_many_rules_take_time_in_proportion():
    chain = "\n".join(f"r{i} ::= r{i + 1} r{i + 2}" for i in range(20_000))
    assert not may_repeat_itself(Grammar(kind="ebnf", text=f"root ::= r0\n{chain}"))
