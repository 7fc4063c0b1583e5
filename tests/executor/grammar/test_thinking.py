from __future__ import annotations

import pytest
import torch

from sapwood.executor.grammar.thinking import AfterThinking
from sapwood.executor.sampling.thinking_budget import ThinkingBudgets
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Thinking
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart
from sapwood.schema.thinking import ThinkingBudget
from tests.executor.grammar.conftest import EOS, allowed

MAY_THINK = Thinking(begin="<think>", end="</think>")


@pytest.fixture
def matcher_of(backend, vocabulary):
    compiled = backend.compile(grammars.regex("[0-9]+|<b>"))
    return lambda thinking: AfterThinking(thinking, compiled.matcher, vocabulary)


def feed(matcher, vocabulary, text: str) -> bool:
    """Whether all of it is taken; the mask must say the same of each token."""
    for token_id in vocabulary.encode(text):
        is_allowed = token_id in allowed(matcher, vocabulary)
        assert matcher.accept(token_id) is is_allowed
        if not is_allowed:
            return False
    return True


@pytest.mark.parametrize(
    ("thinking", "text", "fits"),
    [
        (MAY_THINK, "<think>anything } at all</think>12", True),
        (MAY_THINK, "<think></think></b>", False),
        (MAY_THINK, "12", True),
        (MAY_THINK, "<b>", True),
        (MAY_THINK, "<thx", False),
        (MAY_THINK, "hm", False),
        (MAY_THINK, "<think>a</thinx</think>a", False),
        (MAY_THINK, "<think><</</think>1", True),
        (Thinking(end="</think>", is_open=True), "so </think>12", True),
        (Thinking(end="</think>", is_open=True), "so </think>so", False),
        (Thinking(end="</think>"), "12", True),
        (Thinking(end="</think>"), "<think>", False),
    ],
)
def test_the_grammar_starts_after_the_thinking(matcher_of, vocabulary, thinking, text, fits):
    matcher = matcher_of(thinking)
    assert feed(matcher, vocabulary, text) is fits


def test_thinking_does_not_end_the_output(matcher_of, vocabulary):
    matcher = matcher_of(MAY_THINK)
    assert EOS not in allowed(matcher, vocabulary)
    assert feed(matcher, vocabulary, "<think>hm")
    assert EOS not in allowed(matcher, vocabulary)
    assert not matcher.accept(EOS)
    assert feed(matcher, vocabulary, "</think>")
    assert EOS not in allowed(matcher, vocabulary)
    assert feed(matcher, vocabulary, "1")
    assert EOS in allowed(matcher, vocabulary)
    assert not matcher.has_ended
    assert matcher.accept(EOS)
    assert matcher.has_ended


def test_one_that_does_not_think_is_held_to_the_grammar_at_once(matcher_of, vocabulary):
    matcher = matcher_of(MAY_THINK)
    texts = {vocabulary.tokens[one] for one in allowed(matcher, vocabulary)}
    assert texts == {b"%d" % digit for digit in range(10)} | {b"<"}


def test_a_token_with_the_end_and_the_beginning(backend):
    from sapwood.executor.grammar.vocabulary import Vocabulary

    tokens = (b"t", b"</", b">7", b">x", b"7", b"x", b"")
    by_text = {one.decode(): i for i, one in enumerate(tokens) if one}
    vocabulary = Vocabulary(
        tokens=tokens, special=frozenset(), ends=(6,), encode=lambda text: [by_text[text]]
    )
    compiled = type(backend)(vocabulary).compile(grammars.regex("7+"))
    thinking = Thinking(end="</>", is_open=True)
    matcher = AfterThinking(thinking, compiled.matcher, vocabulary)
    assert [matcher.accept(one) for one in (0, 1, 2)] == [True] * 3
    assert allowed(matcher, vocabulary) == [4, 6]
    matcher = AfterThinking(thinking, compiled.matcher, vocabulary)
    assert [matcher.accept(one) for one in (0, 1, 3)] == [True, True, False]


@pytest.mark.parametrize("wanted", ["<think>12", "12"])
def test_a_budget_of_no_tokens_leaves_the_grammar_something(matcher_of, vocabulary, wanted):
    matcher = matcher_of(MAY_THINK)
    budget = ThinkingBudget(
        max_tokens=0,
        begin=tuple(vocabulary.encode("<think>")),
        end=tuple(vocabulary.encode("</think>")),
        forced=tuple(vocabulary.encode("\n</think>")),
    )
    budgets = ThinkingBudgets()
    budgets.start(
        RowStart(
            row=0,
            options=RequestOptions(sampling=SamplingParams(thinking_budget=budget)),
            seed=0,
            prompt_ids=[1],
            output_ids=[],
        )
    )
    hoped, output = vocabulary.encode(wanted), b""
    for _ in range(30):
        logits = torch.zeros(1, vocabulary.size)
        budgets.apply(logits, [0], [0])
        possible = {
            token for token in allowed(matcher, vocabulary) if logits[0, token] > -torch.inf
        }
        assert possible, f"nothing may follow {output!r}"
        chosen = EOS if EOS in possible else min(possible)
        if hoped and hoped[0] in possible:
            chosen = hoped.pop(0)
        assert matcher.accept(chosen)
        budgets.accept([0], [chosen])
        if chosen == EOS:
            break
        output += vocabulary.tokens[chosen]
    assert output.decode() == wanted.replace("<think>", "<think>\n</think>")
