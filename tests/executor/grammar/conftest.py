"""Both backends over a vocabulary of single bytes."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from sapwood.executor.grammar.interface import CompiledGrammar, GrammarBackend
from sapwood.executor.grammar.llguidance_backend import LLGuidanceBackend
from sapwood.executor.grammar.vocabulary import Vocabulary, vocabulary_of
from sapwood.executor.grammar.xgrammar_backend import XGrammarBackend
from sapwood.text.tokenizer import Tokenizer
from tests.tiny import VOCAB, write_tokenizer

EOS = 257
BACKENDS = {"xgrammar": XGrammarBackend, "llguidance": LLGuidanceBackend}

Walk = Callable[..., tuple[str, bool]]


@pytest.fixture(scope="session")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return vocabulary_of(Tokenizer.from_directory(Path(directory)), size=VOCAB, ends=[EOS])


@pytest.fixture(scope="session", params=sorted(BACKENDS))
def backend(request: pytest.FixtureRequest, vocabulary: Vocabulary) -> GrammarBackend:
    made: GrammarBackend = BACKENDS[request.param](vocabulary)
    return made


def allowed(matcher: object, vocabulary: Vocabulary) -> list[int]:
    masks = np.zeros((1, -(-vocabulary.size // 32)), dtype=np.int32)
    matcher.fill(masks, 0)  # type: ignore[attr-defined]
    bits = np.unpackbits(masks.view(np.uint8), bitorder="little")[: vocabulary.size]
    return [int(one) for one in np.nonzero(bits)[0]]


@pytest.fixture(scope="session")
def accepts(vocabulary: Vocabulary) -> Callable[[CompiledGrammar, str], bool]:
    """Whether a grammar takes the whole text, and may end after it."""

    def check(compiled: CompiledGrammar, text: str) -> bool:
        matcher = compiled.matcher()
        for token_id in vocabulary.encode(text):
            if token_id not in allowed(matcher, vocabulary):
                assert not matcher.accept(token_id), "taken, though the mask forbids it"
                return False
            assert matcher.accept(token_id), "refused, though the mask allows it"
        may_end = EOS in allowed(matcher, vocabulary)
        assert matcher.accept(EOS) is may_end
        assert matcher.has_ended is may_end
        return may_end

    return check


@pytest.fixture(scope="session")
def walk(vocabulary: Vocabulary) -> Walk:
    """A random output of a grammar, and whether it ended within `limit` tokens."""

    def wander(compiled: CompiledGrammar, rng: random.Random, limit: int = 500) -> tuple[str, bool]:
        matcher = compiled.matcher()
        output = b""
        for _ in range(limit):
            choices = allowed(matcher, vocabulary)
            assert choices, f"nothing may follow {output!r}"
            if EOS in choices and (rng.random() < 0.5 or choices == [EOS]):
                assert matcher.accept(EOS)
                return output.decode(), True
            texts = [one for one in choices if one != EOS]
            closing = [one for one in texts if vocabulary.tokens[one] in (b'"', b"}", b"]")]
            ascii_only = [one for one in texts if vocabulary.tokens[one] < b"\x80"]
            wanted = closing if closing and rng.random() < 0.3 else ascii_only or texts
            token_id = rng.choice(wanted)
            assert matcher.accept(token_id)
            output += vocabulary.tokens[token_id]
        return output.decode("utf-8", "replace"), False

    return wander
