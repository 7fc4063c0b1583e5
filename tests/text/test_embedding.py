from __future__ import annotations

import numpy as np
import pytest
import tokenizers

from sapwood.base.errors import InvalidRequest
from sapwood.text.embedding import shortened, sigmoid, softmax
from sapwood.text.tokenizer import Tokenizer


def test_a_shortened_vector_is_of_length_1_again() -> None:
    vector = np.array([3.0, 4.0, 12.0], dtype=np.float32) / 13
    np.testing.assert_allclose(shortened(vector, 2, normalize=True), [0.6, 0.8], rtol=1e-6)
    np.testing.assert_array_equal(shortened(vector, 2, normalize=False), vector[:2])
    nothing = np.zeros(3, dtype=np.float32)
    np.testing.assert_array_equal(shortened(nothing, 2, normalize=True), nothing[:2])


def test_extreme_numbers_neither_overflow_nor_warn() -> None:
    values = np.array([-1e4, 0.0, 1e4], dtype=np.float32)
    np.testing.assert_allclose(sigmoid(values), [0.0, 0.5, 1.0], atol=1e-7)
    np.testing.assert_allclose(softmax(values), [0.0, 0.0, 1.0], atol=1e-7)
    np.testing.assert_allclose(softmax(values[:2] / 1e4), [1 / (1 + np.e), np.e / (1 + np.e)])


def word_pieces() -> tokenizers.Tokenizer:
    words = ["[CLS]", "[SEP]", "[UNK]", "a", "b", "c"]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    backend.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 1), ("[CLS]", 0))
    return backend


def test_a_pair_is_joined_as_the_model_was_trained_on() -> None:
    tokenizer = Tokenizer(word_pieces())
    assert tokenizer.encode_pair("a b", "c") == ([0, 3, 4, 1, 5, 1], 4)
    backend = word_pieces()
    backend.post_processor = tokenizers.processors.Sequence([])
    assert Tokenizer(backend).encode_pair("a b", "c")[0] == [3, 4, 5]
    with pytest.raises(InvalidRequest, match="half of a surrogate pair"):
        tokenizer.encode_pair("a", "\ud800")
