from __future__ import annotations

import pytest

from sapwood.text.standard_library import library_text, package_text


@pytest.fixture(scope="module")
def texts() -> tuple[str, str]:
    return library_text(), package_text()


def test_both_texts_are_english_and_long(texts: tuple[str, str]) -> None:
    for text in texts:
        assert len(text) > 300_000  # about 80,000 tokens of most tokenizers
        assert text.count(" the ") > 2000


def test_the_two_texts_have_next_to_nothing_in_common(texts: tuple[str, str]) -> None:
    """What weights are fitted to must not be what they are measured with."""
    measured, fitted = ({part for part in text.split("\n\n") if len(part) > 100} for text in texts)
    assert len(measured) > 1000
    assert len(measured & fitted) < 0.02 * len(measured)
