"""Matchers go back any number of tokens: with both backends, after an end, after forced text and
across the end of the reasoning."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sapwood.executor.grammar.interface import MAX_ROLLBACK
from sapwood.executor.grammar.jump import forced_tokens
from sapwood.executor.grammar.thinking import AfterThinking
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Thinking
from tests.executor.grammar.conftest import EOS, allowed
from tests.tiers import examples

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Ann", "Anna", "Bo"]}, "n": {"type": "integer"}},
    "required": ["name", "n"],
    "additionalProperties": False,
}
THINKING = {
    "none": None,
    "may": Thinking(begin="<think>", end="</think>"),
    "open": Thinking(end="</think>", is_open=True),
}
GRAMMARS = {
    "regex": grammars.regex("(<a>)?[0-9]{1,3}(, [0-9]{1,3})*"),
    "schema": grammars.json_schema(SCHEMA),
    "tag": grammars.structural_tag(
        {"structures": [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}], "triggers": ["<f"]}
    ),
}
STEPS = st.lists(
    st.one_of(
        # A share of the allowed tokens says which of them is taken.
        st.tuples(st.just("take"), st.floats(0, 1, exclude_max=True)),
        st.tuples(st.just("text"), st.sampled_from(["</think>", "<think>", "<f>", '{"name":'])),
        st.tuples(st.just("end"), st.just(0)),
        st.tuples(st.just("jump"), st.just(0)),
        st.tuples(st.just("back"), st.integers(0, 40)),
    ),
    max_size=40,
)


@pytest.fixture(scope="module")
def new_matcher(backend, vocabulary):
    compiled = {name: backend.compile(grammar) for name, grammar in GRAMMARS.items()}

    def make(grammar: str, thinking: str):
        asked = THINKING[thinking]
        if asked is None:
            return compiled[grammar].matcher()
        return AfterThinking(asked, compiled[grammar].matcher, vocabulary)

    return make


def mask_of(matcher, vocabulary):
    mask = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
    matcher.fill(mask, 0)
    return mask


def assert_same(matcher, fresh, taken, vocabulary) -> None:
    """`matcher` is where a new one is that takes those tokens."""
    assert all(fresh.accept(token_id) for token_id in taken)
    assert matcher.has_ended == fresh.has_ended
    if not matcher.has_ended:
        assert (mask_of(matcher, vocabulary) == mask_of(fresh, vocabulary)).all()


@pytest.mark.parametrize("thinking", sorted(THINKING))
@pytest.mark.parametrize("grammar", sorted(GRAMMARS))
@settings(max_examples=examples(500))
@given(steps=STEPS)
def test_after_any_steps_back_it_is_where_a_new_one_is(
    new_matcher, vocabulary, grammar, thinking, steps
):
    matcher = new_matcher(grammar, thinking)
    taken: list[int] = []
    for kind, value in steps:
        if kind == "back":
            count = min(value, len(taken))
            matcher.rollback(count)
            taken = taken[: len(taken) - count]
            assert_same(matcher, new_matcher(grammar, thinking), taken, vocabulary)
            continue
        if matcher.has_ended:
            assert not matcher.accept(vocabulary.encode("1")[0])
            continue
        if kind == "jump":
            tokens = forced_tokens(matcher, mask_of(matcher, vocabulary), vocabulary)
        elif kind == "take":
            choices = allowed(matcher, vocabulary)
            tokens = [choices[int(value * len(choices))]]
        else:
            tokens = [EOS] if kind == "end" else vocabulary.encode(value)
        for token_id in tokens:
            if not matcher.accept(token_id):
                break
            taken.append(token_id)
    assert_same(matcher, new_matcher(grammar, thinking), taken, vocabulary)


def test_a_token_that_ends_the_reasoning_wrongly_is_not_taken(backend):
    from sapwood.executor.grammar.vocabulary import Vocabulary

    tokens = (b"t", b"</", b">7", b">x", b"7", b"")
    by_text = {token.decode(): at for at, token in enumerate(tokens)}
    own = Vocabulary(
        tokens=tokens, special=frozenset(), ends=(5,), encode=lambda text: [by_text[text]]
    )
    compiled = type(backend)(own).compile(grammars.regex("7"))
    # "x" alone is no token of this vocabulary, so ">x" has an answer that cannot be read.
    by_text["x"] = 0
    matcher = AfterThinking(Thinking(end="</>", is_open=True), compiled.matcher, own)
    assert matcher.accept(1)
    assert not matcher.accept(3)
    assert matcher.accept(2)
    assert allowed(matcher, own) == [5]
    matcher.rollback(1)
    assert matcher.accept(0)


@pytest.mark.parametrize("thinking", ["none", "may"])
def test_more_tokens_than_were_taken_cannot_be_taken_back(new_matcher, vocabulary, thinking):
    matcher = new_matcher("regex", thinking)
    for token_id in vocabulary.encode("12"):
        assert matcher.accept(token_id)
    for count in (3, -1, MAX_ROLLBACK + 1):
        with pytest.raises(ValueError, match="only 0 to 2"):
            matcher.rollback(count)
    assert_same(matcher, new_matcher("regex", thinking), vocabulary.encode("12"), vocabulary)
