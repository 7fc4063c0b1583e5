from __future__ import annotations

import numpy as np
import pytest
import torch

from sapwood.executor.grammar.ahead import GrammarsAhead
from sapwood.executor.grammar.interface import MAX_ROLLBACK, SLOW_STEP_S, GrammarFailed
from sapwood.executor.grammar.masks import GrammarMasks
from sapwood.kernels.torch_ops import TorchKernels
from tests.executor.grammar.conftest import EOS
from tests.executor.grammar.test_masks import left, start


class Clock:
    def __init__(self):
        self.now_s = self.step_s = 0.0

    def __call__(self):
        self.now_s += self.step_s
        return self.now_s


@pytest.fixture
def masks(backend, vocabulary):
    class Now:
        def compiled(self, grammar):
            return backend.compile(grammar)

    return GrammarMasks(
        Now(),
        TorchKernels(),
        num_rows=8,
        vocab_size=vocabulary.size,
        failures={},
        vocabulary=lambda: vocabulary,
    )


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def ahead(masks, clock):
    return GrammarsAhead(masks, TorchKernels(), clock_s=clock)


def seen(ahead, vocabulary, rows):
    logits = torch.zeros(len(rows), vocabulary.size)
    ahead.apply(logits, rows)
    return [left(one, vocabulary) for one in logits]


def test_guesses_follow_the_grammar_and_leave_no_trace(masks, ahead, vocabulary):
    for row, text in ((4, "abc"), (1, None), (7, "[xy]*z")):
        masks.start(start(row, text))
    rows, [a, b, x, z] = [7, 1, 4], vocabulary.encode("abxz")
    everything = left(torch.zeros(vocabulary.size), vocabulary)
    for _ in range(2):
        ahead.begin(rows)
        assert seen(ahead, vocabulary, rows) == [[b"x", b"y", b"z"], everything, [b"a"]]
        assert ahead.take(rows, [x, 3, a]) == set()
        assert seen(ahead, vocabulary, rows) == [[b"x", b"y", b"z"], everything, [b"b"]]
        assert ahead.take(rows, [z, 3, b]) == set()
        assert ahead.take([7], [EOS]) == {7}
        assert seen(ahead, vocabulary, [7, 4]) == [everything, [b"c"]]
        ahead.end()
    masks.accept([4], [a])
    logits = torch.zeros(2, vocabulary.size)
    masks.apply(logits, [4, 7])
    assert left(logits[0], vocabulary) == [b"b"]
    assert left(logits[1], vocabulary) == [b"x", b"y", b"z"]


def test_guesses_of_a_tree_have_masks_of_their_own(masks, ahead, vocabulary):
    masks.start(start(2, "a(bc|x[yz])"))
    a, b, c, x = vocabulary.encode("abcx")
    ways = [[], [a], [a, x], [a, b], [a, b, c, EOS], [a, b, c]]
    for _ in range(2):
        ahead.begin([2])
        logits = torch.zeros(len(ways), vocabulary.size)
        assert ahead.apply(logits, [2] * len(ways), ways) == {4}
        found = [left(one, vocabulary) for one in logits]
        assert found[:4] == [[b"a"], [b"b", b"x"], [b"y", b"z"], [b"c"]]
        assert logits[5].argmax() == EOS
        assert logits[5].isfinite().sum() == 1
        ahead.end()


def test_a_wrong_guess_ends_the_masks_of_its_row(masks, ahead, vocabulary):
    masks.start(start(0, "ab"))
    ahead.begin([0])
    assert ahead.take([0], vocabulary.encode("b")) == set()
    assert len(seen(ahead, vocabulary, [0])[0]) == vocabulary.size
    ahead.end()
    assert masks._failures == {}
    assert masks.next_mask(0).any()


def test_the_first_mask_is_kept_for_the_next_token(masks, ahead, vocabulary):
    masks.start(start(0, "[ab]"))
    ahead.begin([0])
    seen(ahead, vocabulary, [0])
    ahead.end()

    def fill(self, filled, index):
        raise AssertionError("the mask is known")

    masks._rows[0].matcher = type("Known", (), {"fill": fill, "has_ended": False})()
    logits = torch.zeros(1, vocabulary.size)
    masks.apply(logits, [0])
    assert left(logits[0], vocabulary) == [b"a", b"b"]


def test_matchers_that_fail_or_are_slow_are_left_alone(masks, ahead, clock, vocabulary):
    class Matcher:
        has_ended = False
        num_taken = 0
        fails = False

        def fill(self, filled, index):
            if self.fails and self.num_taken:
                raise GrammarFailed("too complex")
            filled[index] = np.int32(-1)

        def accept(self, token_id):
            self.num_taken += 1
            return True

        def rollback(self, num_tokens):
            assert num_tokens <= MAX_ROLLBACK
            self.num_taken -= num_tokens

    masks.start(start(0, "ab"))
    matcher = masks._rows[0].matcher = Matcher()
    for matcher.fails, clock.step_s in ((True, 0.0), (False, 2 * SLOW_STEP_S)):
        ahead.begin([0])
        ahead.take([0], [1])
        seen(ahead, vocabulary, [0])
        assert matcher.num_taken == 0
        ahead.take([0], [1])
        assert matcher.num_taken == 0
        ahead.end()
    clock.step_s = 0.0
    ahead.begin([0])
    for _ in range(MAX_ROLLBACK + 5):
        ahead.take([0], [1])
    ahead.end()
    assert matcher.num_taken == 0
    assert masks._failures == {}
