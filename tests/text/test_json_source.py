"""JSON as it arrives: what is JSON passes as it is, what is not is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.text.json_source import json_value, parsed
from sapwood.text.source import Malformed, Source, run

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def passed_on(parts):
    """What comes out of the parts of a text, and where the reading ended."""
    source, out = Source(), []
    steps = json_value(source, out.append)
    for part in parts:
        source.add(part)
        if not run(source, steps):
            break
    else:
        source.end()
        assert not run(source, steps)
    return "".join(out)


@given(VALUES, st.sampled_from([None, 2]), st.booleans(), st.data())
def test_json_passes_unchanged_however_it_is_split(value, indent, ascii_only, data):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii_only)
    at = data.draw(st.integers(0, len(text)))
    assert passed_on([text]) == passed_on([text[:at], text[at:]]) == passed_on(text) == text


@given(st.text(alphabet='{}[]",:\\/ue0159-+. \n\x00tfnrals', max_size=12))
def test_what_passes_is_json(text):
    try:
        out = passed_on([text])
    except Malformed:
        return
    parsed(out)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1", '"a', "01", "+1", "1.", ".5", "1e", "NaN", "Infinity", "-", "tru", "nul"),
        *("{1: 2}", "{a: 1}", '{"a" 1}', '{"a": 1 "b"}', '{"a": 1,}', "[1,]", "[,1]", "[1 2]"),
        *('"\\x"', '"\\u12"', '"\\ud800"', '"\\ud800\\n"', '"\\udc00"', "'a'", "1e999", "[" * 150),
    ],
)
def test_what_is_not_json_is_refused_at_every_split(text):
    for at in range(len(text) + 1):
        with pytest.raises(Malformed):
            passed_on([text[:at], text[at:]])


def test_control_characters_in_strings_are_escaped():
    assert json.loads(passed_on(['"a\nb\x01c"'])) == "a\nb\x01c"


@pytest.mark.parametrize("text", ["NaN", "[1e999]", '"\\ud800"', "{", "[" * 100_000])
def test_parsed_refuses_what_not_every_reader_takes(text):
    with pytest.raises(ValueError, match=r".+"):
        parsed(text)
