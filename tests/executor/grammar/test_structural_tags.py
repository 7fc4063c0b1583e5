from __future__ import annotations

import pytest

from sapwood.base.errors import InvalidRequest
from sapwood.executor.grammar.structural_tags import to_lark, with_parts


def test_every_schema_is_changed_and_nothing_else():
    inner = {"type": "json_schema", "json_schema": {"type": "json_schema"}}
    form = {"type": "sequence", "elements": [inner, {"type": "tag", "content": inner}]}
    changed = with_parts(form, lambda schema: [schema])
    new = {"type": "json_schema", "json_schema": [{"type": "json_schema"}]}
    assert changed == {"type": "sequence", "elements": [new, {"type": "tag", "content": new}]}


@pytest.mark.parametrize(
    "form",
    [
        {"type": "sequence", "elements": [{"type": "any_text"}, {"type": "any_text"}]},
        {"type": "token", "token": 3},
        {"type": "json_schema", "json_schema": {}, "style": "qwen_xml"},
        {"type": "triggered_tags", "triggers": ["<"], "tags": [], "excludes": ["x"]},
        {"type": "tag", "begin": "<", "content": {"type": "any_text"}, "end": ["a", "b"]},
    ],
)
def test_what_llguidance_has_no_form_for(form, vocabulary):
    with pytest.raises(InvalidRequest, match="llguidance"):
        to_lark(form, vocabulary, "{}")
