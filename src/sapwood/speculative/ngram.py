"""Drafts copied from the request's own text: what followed the last tokens when they came before.

Source: prompt lookup decoding, as in Hugging Face transformers (`prompt_lookup_num_tokens`). It
needs no draft model, and pays where an output repeats its prompt: in edits, summaries and code.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

FIRST_CAPACITY = 256
MOST_MATCHES = 1024
"""The latest occurrences of the last token that are looked at: a prompt may be one token, again and
again."""


class NgramDraft:
    """The text of one request, searched anew for each draft.

    A search compares the last token with all others, and then looks at the latest matches alone. So
    there is no index to keep, and no request can make one grow.
    """

    def __init__(self, prompt_ids: Sequence[int], *, least_match: int, most_match: int) -> None:
        """least_match, most_match  tokens that must repeat for a guess; tokens looked at"""
        self._tokens: NDArray[np.int32] = np.zeros(FIRST_CAPACITY, dtype=np.int32)
        self._size = 0
        self._least_match = least_match
        self._most_match = most_match
        self.extend(prompt_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        size = self._size + len(token_ids)
        if size > len(self._tokens):
            grown = np.zeros(max(size, 2 * len(self._tokens)), dtype=np.int32)
            grown[: self._size] = self._tokens[: self._size]
            self._tokens = grown
        self._tokens[self._size : size] = token_ids
        self._size = size

    def propose(self, most: int) -> list[int]:
        """What followed the latest of the longest matches; if that reaches the text's end, the text
        between the two repeats itself."""
        tokens = self._tokens[: self._size]
        if most <= 0 or self._size <= self._least_match:
            return []
        # Each match is the place of the token after it.
        matches = np.flatnonzero(tokens[:-1] == tokens[-1])[-MOST_MATCHES:] + 1
        length = 1
        while length < self._most_match and len(matches):
            longer = matches[matches > length]
            longer = longer[tokens[longer - 1 - length] == tokens[-1 - length]]
            if not len(longer):
                break
            matches, length = longer, length + 1
        if not len(matches) or length < self._least_match:
            return []
        follows = tokens[matches[-1] :]
        return np.resize(follows, most).tolist() if most > len(follows) else follows[:most].tolist()


class NgramDrafter:
    """least_match, most_match  as in NgramDraft"""

    def __init__(self, *, least_match: int, most_match: int) -> None:
        self._least_match = least_match
        self._most_match = most_match

    def begin(self, prompt_ids: Sequence[int]) -> NgramDraft:
        return NgramDraft(prompt_ids, least_match=self._least_match, most_match=self._most_match)
