"""Every format: what its model writes is found, whole or in pieces, and nothing is ever lost."""

from __future__ import annotations

import itertools
import json
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.text.answer import AnswerShape
from sapwood.text.events import CallArguments
from sapwood.text.tools.format import MAX_REREAD, ToolSet
from sapwood.text.tools.registry import TOOL_FORMATS
from tests.text.tools.checks import check_nothing_lost, in_two, read
from tests.text.tools.samples import CALL_LISTS, PARIS, TOOLS, samples_of
from tests.text.tools.spelling import SPELLERS
from tests.tiers import examples, long_only

NAMES = sorted(SPELLERS)
NUM_MUTATIONS = examples(10_000)


def shape_of(name: str, **changes) -> AnswerShape:
    tools = ToolSet(parameters=TOOLS, **changes)
    return AnswerShape(calls=TOOL_FORMATS.get(name)(), tools=tools)


def test_every_registered_format_has_samples():
    assert {TOOL_FORMATS.get(name).name for name in TOOL_FORMATS.names()} == set(NAMES)
    assert all(len(samples_of(name)) >= 15 for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_calls_and_content_are_found(name):
    for sample in samples_of(name):
        answer = shape_of(name).parsed(sample.text)
        found = [(call.name, json.loads(call.arguments)) for call in answer.calls]
        assert found == list(sample.calls), sample.label
        assert answer.content == sample.content, sample.label


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("step", [4, *long_only(1)])
def test_every_split_in_two_gives_the_same(name, step):
    shape = shape_of(name)
    for sample in samples_of(name):
        whole = check_nothing_lost(shape, sample.text)
        for parts in itertools.islice(in_two(sample.text), 0, None, step):
            assert read(shape, parts) == whole, (sample.label, parts)


@pytest.mark.parametrize("name", NAMES)
def test_character_by_character_gives_the_same(name):
    shape = shape_of(name)
    for sample in samples_of(name):
        assert read(shape, sample.text) == read(shape, [sample.text]), sample.label


@settings(max_examples=examples(500))
@given(st.data())
def test_random_splits_give_the_same(data):
    name = data.draw(st.sampled_from(NAMES))
    sample = data.draw(st.sampled_from(samples_of(name)))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(sample.text)), max_size=12)))
    bounds = [0, *cuts, len(sample.text)]
    parts = [sample.text[a:b] for a, b in itertools.pairwise(bounds)]
    shape = shape_of(name)
    assert read(shape, parts) == read(shape, [sample.text])


@pytest.mark.parametrize("name", NAMES)
def test_an_answer_that_breaks_off_loses_nothing(name):
    """At every place; what was complete before is still a call."""
    shape = shape_of(name)
    text = SPELLERS[name][0]([PARIS, CALL_LISTS["nested"][0]])
    num_calls = []
    for end in range(len(text) + 1):
        check_nothing_lost(shape, text[:end])
        num_calls.append(len(shape.parsed(text[:end]).calls))
    assert num_calls == sorted(num_calls)
    assert set(num_calls) == {0, 1, 2}


@pytest.mark.parametrize("name", NAMES)
def test_a_broken_call_comes_back_as_content(name):
    shape = shape_of(name)
    for cut in (0.4, 0.7):
        text = SPELLERS[name][0]([PARIS])
        text = text[: int(len(text) * cut)]
        answer = shape.parsed(text)
        assert (answer.content, answer.calls) == (text, [])


@pytest.mark.parametrize("name", NAMES)
def test_tools_that_are_not_known(name):
    text = SPELLERS[name][0]([("rm_rf", {"path": "/"})])
    as_content = shape_of(name).parsed(text)
    assert (as_content.content, as_content.calls) == (text, [])
    [call] = shape_of(name, keeps_unknown=True).parsed(text).calls
    assert (call.name, json.loads(call.arguments)) == ("rm_rf", {"path": "/"})


@pytest.mark.parametrize("name", NAMES)
def test_calls_beyond_the_limit_come_back_as_content(name):
    text = SPELLERS[name][0](CALL_LISTS["two of one tool"])
    shape = shape_of(name, max_calls=1)
    check_nothing_lost(shape, text)
    answer = shape.parsed(text)
    assert [json.loads(call.arguments)["city"] for call in answer.calls] == ["Paris"]
    assert "Rome" in answer.content


@pytest.mark.parametrize("name", NAMES)
def test_text_without_calls_is_content(name):
    shape = shape_of(name)
    for text in ("", " ", "Hello, world!\n", '{"a": [1, 2]}', "a [b](c) <d> [e] {f", "\n\n x \n"):
        assert shape.parsed(text).content == text


@pytest.mark.parametrize("name", NAMES)
def test_mutated_samples_raise_nothing_and_lose_nothing(name):
    """Random bytes changed, dropped, doubled or moved; together NUM_MUTATIONS of all formats."""
    shape = shape_of(name, keeps_unknown=True)
    samples = samples_of(name)
    random_numbers = random.Random(f"mutations of {name}")
    for _ in range(-(-NUM_MUTATIONS // len(NAMES))):
        text = mutated(random_numbers.choice(samples).text, random_numbers)
        whole = check_nothing_lost(shape, text)
        at = random_numbers.randrange(len(text) + 1)
        assert read(shape, [text[:at], text[at:]]) == whole


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ends", ["", "\n</nothing>"])
def test_beginnings_of_calls_alone_cost_no_more_than_their_length(name, ends):
    """The same beginning again and again: the events together are no longer than the text."""
    one, repeats = SPELLERS[name][0]([PARIS]), 500
    for length in {len(one) // 2, 3 * len(one) // 4}:
        events = check_nothing_lost(shape_of(name), one[:length] * repeats + ends)
        told = sum(len(event.text) for event in events if isinstance(event, CallArguments))
        assert told <= 2 * MAX_REREAD + repeats * length


def mutated(text: str, random_numbers: random.Random) -> str:
    raw = bytearray(text.encode())
    for _ in range(random_numbers.randint(1, 4)):
        at = random_numbers.randrange(len(raw) + 1)
        end = min(len(raw), at + random_numbers.randint(1, 12))
        kind = random_numbers.randrange(4)
        if kind == 0 and at < len(raw):
            raw[at] = random_numbers.randrange(256)
        elif kind == 1:
            del raw[at:end]
        elif kind == 2:
            raw[at:at] = raw[at:end]
        else:
            raw[at:at] = bytes([random_numbers.choice(b'{}[]"<>|\\/:,=()\n;ae0 ')])
    return raw.decode(errors="replace")
