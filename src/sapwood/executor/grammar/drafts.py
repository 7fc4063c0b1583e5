"""Masks for several tokens of one output in one step: a draft and the token after it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from sapwood.executor.grammar.interface import MAX_ROLLBACK, Matcher


def fill_masks(
    matcher: Matcher, draft_ids: Sequence[int], masks: NDArray[np.int32], first: int
) -> int:
    """Write masks[first + i], for i from 0 to len(draft_ids): what may come after draft_ids[:i].

    Returns how many tokens of the draft the grammar allows. The rows of `masks` after the first
    refused token, or after an end of the output, allow every token, since the step drops what is
    sampled there. The matcher stays where it is.

    masks  [n, ceil(vocab / 32)] as for `Matcher.fill`; n >= first + len(draft_ids) + 1
    Raises GrammarFailed as `fill` and `accept` do, ValueError if the draft has more than
    MAX_ROLLBACK tokens."""
    if len(draft_ids) > MAX_ROLLBACK:
        raise ValueError(f"a draft of {len(draft_ids)} tokens; at most {MAX_ROLLBACK} can be taken")
    masks[first : first + len(draft_ids) + 1] = -1
    num_taken = 0
    try:
        if not matcher.has_ended:
            matcher.fill(masks, first)
        for token_id in draft_ids:
            if not matcher.accept(token_id):
                break
            num_taken += 1
            if not matcher.has_ended:
                matcher.fill(masks, first + num_taken)
    finally:
        matcher.rollback(num_taken)
    return num_taken
