from __future__ import annotations

import msgspec
import pytest
import torch

from sapwood.executor.grammar.interface import SLOW_BUDGET_S, SLOW_STEP_S, GrammarFailed
from sapwood.executor.grammar.jump import MAX_FORCED_TOKENS
from sapwood.executor.grammar.masks import MOST_SLOW_AT_ONCE_S, SLOW_SHARE, GrammarMasks
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.schema import grammar as grammars
from sapwood.schema.grammar import Grammar
from sapwood.schema.request import RequestOptions
from sapwood.schema.sampling import SamplingParams
from sapwood.schema.step import RowStart
from tests.executor.grammar.conftest import EOS


@pytest.fixture
def failures():
    return {}


class Now:
    """Compiles at once, and remembers what is refused."""

    def __init__(self, backend) -> None:
        self.backend = backend
        self.refused: dict[str, str] = {}

    def compiled(self, grammar):
        if grammar.text in self.refused:
            raise GrammarFailed(self.refused[grammar.text])
        return self.backend.compile(grammar)

    def refuse_slow(self, grammar, reason):
        self.refused[grammar.text] = reason


@pytest.fixture
def masks(backend, vocabulary, failures):
    return GrammarMasks(
        Now(backend),
        TorchKernels(),
        num_rows=32,
        vocab_size=vocabulary.size,
        failures=failures,
        vocabulary=lambda: vocabulary,
        may_jump=True,
    )


def start(row: int, text: str | None, output_ids=(), **sampling) -> RowStart:
    grammar = None if text is None else grammars.regex(text)
    return RowStart(
        row=row,
        options=RequestOptions(sampling=SamplingParams(grammar=grammar, **sampling)),
        seed=0,
        prompt_ids=[1],
        output_ids=list(output_ids),
    )


def left(logits: torch.Tensor, vocabulary) -> list[bytes]:
    return [vocabulary.tokens[i] for i in (logits > -torch.inf).nonzero()[:, 0].tolist()]


def test_each_row_has_its_own(masks, vocabulary):
    for row, text in ((4, "ab"), (1, None), (7, "[x-z]")):
        masks.start(start(row, text))
    logits = torch.zeros(3, vocabulary.size)
    masks.apply(logits, [7, 1, 4])
    assert left(logits[0], vocabulary) == [b"x", b"y", b"z"]
    assert len(left(logits[1], vocabulary)) == vocabulary.size
    assert left(logits[2], vocabulary) == [b"a"]
    masks.accept([7, 1, 4], [*vocabulary.encode("y"), 3, *vocabulary.encode("a")])
    logits = torch.zeros(2, vocabulary.size)
    masks.apply(logits, [4, 7])
    assert left(logits[0], vocabulary) == [b"b"]
    assert (logits[1] > -torch.inf).nonzero().tolist() == [[EOS]]


def test_more_rows_than_it_began_with(masks, vocabulary):
    rows = list(range(20))
    for row in rows:
        masks.start(start(row, "[ab]"))
    logits = torch.zeros(20, vocabulary.size)
    masks.apply(logits, rows)
    assert all(left(one, vocabulary) == [b"a", b"b"] for one in logits)


def test_a_retracted_request_goes_on_where_it_was(masks, vocabulary):
    masks.start(start(0, "abc", vocabulary.encode("ab")))
    logits = torch.zeros(1, vocabulary.size)
    masks.apply(logits, [0])
    assert left(logits[0], vocabulary) == [b"c"]


def test_state_goes_with_the_request(masks, vocabulary):
    masks.start(start(0, "a"))
    masks.start(start(1, "a"))
    assert len(masks.stateful_rows) == 2
    masks.end(0)
    masks.start(start(1, None))
    assert len(masks.stateful_rows) == 0
    masks.end(0)
    logits = torch.zeros(2, vocabulary.size)
    masks.apply(logits, [0, 1])
    assert (logits == 0).all()


def test_steps_after_the_end_are_left_alone(masks, vocabulary, failures):
    masks.start(start(0, "a"))
    masks.accept([0], vocabulary.encode("a"))
    masks.accept([0], [EOS])
    logits = torch.zeros(1, vocabulary.size)
    masks.apply(logits, [0])
    assert (logits == 0).all()
    masks.accept([0], [5])
    assert failures == {}


def test_a_token_that_does_not_match_ends_the_request(masks, vocabulary, failures):
    masks.start(start(3, "a"))
    masks.accept([3], vocabulary.encode("b"))
    assert "does not match" in failures[3]
    assert len(masks.stateful_rows) == 0


def test_an_output_that_does_not_match_ends_the_request(masks, vocabulary, failures):
    masks.start(start(3, "a", vocabulary.encode("b")))
    assert "does not match" in failures[3]


def test_a_grammar_that_fails_over_the_output_so_far_ends_its_request_only(
    masks, vocabulary, failures
):
    class Failing:
        has_ended = False

        def accept(self, token_id):
            raise GrammarFailed("too complex")

    compiled = type("Compiled", (), {"matcher": lambda self: Failing()})()
    masks._grammars = type("Grammars", (), {"compiled": lambda self, grammar: compiled})()
    masks.start(start(0, "ab", vocabulary.encode("a")))
    assert failures == {0: "too complex"}
    assert len(masks.stateful_rows) == 0


def test_a_grammar_that_fails_ends_its_request_only(masks, vocabulary, failures):
    class Failing:
        has_ended = False

        def fill(self, masks, index):
            raise GrammarFailed("too complex")

    masks.start(start(0, "a"))
    masks.start(start(1, "b"))
    masks._rows[0].matcher = Failing()
    logits = torch.zeros(2, vocabulary.size)
    masks.apply(logits, [0, 1])
    assert failures == {0: "too complex"}
    assert left(logits[1], vocabulary) == [b"b"]


def test_a_grammar_that_is_slow_to_follow_ends_its_request_only(masks, vocabulary, failures):
    now_s = [0.0]
    masks._clock_s = lambda: now_s[0]

    class Slow:
        has_ended = False

        def fill(self, masks, index):
            now_s[0] += SLOW_STEP_S + 0.4 * SLOW_BUDGET_S
            masks[index] = -1

    masks.start(start(0, "a"))
    masks.start(start(1, "b"))
    masks._rows[0].matcher = Slow()
    for _ in range(2):
        masks.apply(torch.zeros(2, vocabulary.size), [0, 1])
    assert failures == {}
    masks.apply(torch.zeros(2, vocabulary.size), [0, 1])
    assert list(failures) == [0]
    assert "too long to follow" in failures[0]
    assert 1 in masks.stateful_rows
    # The same grammar is not followed once more.
    masks.start(start(2, "a"))
    assert failures[2] == failures[0]
    masks.start(start(3, "c"))
    assert 3 in masks.stateful_rows


def test_slow_grammars_share_a_tenth_of_each_second(masks, vocabulary, failures):
    """Review 2, number 2: each of many requests had half a second of its own."""
    now_s, passed_s = [0.0], [0.0]
    masks._clock_s = lambda: now_s[0]
    masks._wall_s = lambda: passed_s[0]
    masks._refilled_s = 0.0
    slow_s = 0.9 * SLOW_BUDGET_S

    class Slow:
        has_ended = False

        def fill(self, masks, index):
            now_s[0] += SLOW_STEP_S + slow_s
            masks[index] = -1

    for row in range(10):
        masks.start(start(row, f"a{row}"))
        masks._rows[row].matcher = Slow()
    masks.start(start(10, "b"))
    masks.apply(torch.zeros(11, vocabulary.size), list(range(11)))
    in_time = int(SLOW_SHARE / slow_s)
    at_once = int((SLOW_SHARE + MOST_SLOW_AT_ONCE_S) / slow_s)
    assert sorted(failures) == list(range(at_once, 10))
    assert all("together" in reason for reason in failures.values())
    pauses = masks.take_pauses()
    assert sorted(pauses) == list(range(in_time, at_once))
    for row, pause_s in pauses.items():
        assert pause_s == pytest.approx(((row + 1) * slow_s - SLOW_SHARE) / SLOW_SHARE)
    assert masks.take_pauses() == {}
    assert 10 in masks.stateful_rows
    assert masks._grammars.refused == {}, "it is not these texts' fault"
    passed_s[0] = 10.0
    masks.start(start(11, "c"))
    masks._rows[11].matcher = Slow()
    masks.apply(torch.zeros(1, vocabulary.size), [11])
    assert 11 not in failures
    assert masks.take_pauses() == {}


def test_long_forced_text_is_put_out_in_parts(masks, vocabulary, failures):
    endless = Grammar(kind="ebnf", text='root ::= "ab"{1000}')
    masks.start(
        msgspec.structs.replace(
            start(0, None), options=RequestOptions(sampling=SamplingParams(grammar=endless))
        )
    )
    jumped = masks.jump([0])[0]
    assert b"".join(vocabulary.tokens[one] for one in jumped).startswith(b"abab")
    assert len(jumped) < MAX_FORCED_TOKENS
    assert len(masks.jump([0])[0]) == len(jumped)
    assert failures == {}


def test_following_forced_text_may_take_as_long_as_many_masks(masks, vocabulary, failures):
    now_s = [0.0]
    masks._clock_s = lambda: now_s[0]
    masks.start(start(0, "(abcdefgh[xy])*"))
    matcher = masks._rows[0].matcher
    fill = matcher.fill

    def slower_fill(target, index):
        now_s[0] += 0.002
        fill(target, index)

    matcher.fill = slower_fill
    budget_s = masks._rows[0].spare_s
    masks.accept([0], vocabulary.encode("a"))
    assert masks.jump([0])[0] == vocabulary.encode("bcdefg")
    assert masks._rows[0].spare_s == budget_s
    now_s[0] = 0.0
    masks._rows[0].spare_s = -1.0
    masks.accept([0], vocabulary.encode("h"))
    assert "too long to follow" in failures[0]


def test_a_request_that_was_aborted_before_its_step_is_told_so(masks, failures):
    masks._grammars = type("Gone", (), {"compiled": lambda self, grammar: None})()
    masks.start(start(0, "a"))
    assert failures == {0: "the request has ended"}


def test_the_grammar_prevails_over_min_new_tokens(masks, vocabulary):
    masks.start(start(0, "a", vocabulary.encode("a"), min_new_tokens=5))
    logits = torch.zeros(1, vocabulary.size)
    logits[0, EOS] = -torch.inf
    masks.apply(logits, [0])
    assert (logits[0] > -torch.inf).nonzero().tolist() == [[EOS]]
    assert logits[0, EOS].isfinite()


def test_jumps_leave_the_last_token_open(masks, vocabulary):
    masks.start(start(0, "hello [ab]"))
    masks.start(start(1, "[ab]"))
    masks.start(start(2, None))
    jumps = masks.jump([0, 1, 2])
    assert jumps == {0: vocabulary.encode("hello")}
    logits = torch.zeros(1, vocabulary.size)
    masks.apply(logits, [0])
    assert left(logits[0], vocabulary) == [b" "]
