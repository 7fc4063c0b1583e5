import random

import pytest
from tokenizers import AddedToken, Tokenizer, models

from sapwood.base.errors import ConfigError
from sapwood.bench.workloads.vocabulary import (
    WORDS,
    TokenVocabulary,
    WordVocabulary,
    read_vocabulary,
)


def write_tokenizer(directory):
    vocabulary = {f"word{index}": index for index in range(50)} | {"<s>": 50}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="word0"))
    tokenizer.add_special_tokens(
        [AddedToken("<s>", special=True), AddedToken("</s>", special=True)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_special_tokens_are_never_drawn(tmp_path, name):
    write_tokenizer(tmp_path)
    # "<s>" is both in the vocabulary and special, "</s>" only added.
    assert read_vocabulary(tmp_path / name).token_ids == tuple(range(50))


def test_no_tokenizer_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="no tokenizer at"):
        read_vocabulary(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ConfigError, match="is not a tokenizer"):
        read_vocabulary(tmp_path)


def test_a_tiny_vocabulary_is_refused():
    with pytest.raises(ConfigError, match="at least 16"):
        TokenVocabulary((1, 2, 3))


def test_tokens_render_as_ids_and_words_as_text():
    tokens = TokenVocabulary(tuple(range(100, 200)))
    units = tokens.draw(random.Random(1), 40)
    assert tokens.render(units) == units
    assert all(100 <= unit < 200 for unit in units)

    words = WordVocabulary(WORDS)
    text = words.render(words.draw(random.Random(1), 40))
    assert isinstance(text, str)
    assert len(text.split()) == 40
    assert set(text.split()) <= set(WORDS)


def test_no_word_is_listed_twice():
    assert len(set(WORDS)) == len(WORDS) > 300
