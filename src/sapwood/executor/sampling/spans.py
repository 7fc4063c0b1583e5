"""Chooses the tokens of requests of which some have drafts, and tells which drafts were right.

A draft is right if it is the token that is sampled in its place: with the random number that this
place has in the request, and with penalties and grammars as they are after the tokens before it.
So drafts change how many steps an output takes, and never the output: exact-match verification.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from sapwood.executor.sampling.sampler import Sampler
from sapwood.kernels.transfer import upload_one
from sapwood.schema.step import ScheduledTokens


def choose_spans(
    sampler: Sampler, logits: Tensor, entries: Sequence[ScheduledTokens]
) -> list[list[int]]:
    """The tokens of each entry: its right drafts, and the token that was sampled after them; of a
    row that fails only those before.

    Waits for the device. The tokens of stateful rows have been accepted afterwards.

    logits   [S, vocab], may be overwritten: after each of `logits_for` of the entries, in order
    entries  those that sample; all earlier tokens of their stateful rows must be accepted
    """
    counts = [len(entry.logits_for) for entry in entries]
    firsts = [end - count for end, count in zip(accumulate(counts), counts, strict=True)]
    stateful = sampler.stateful_rows([entry.row for entry in entries])
    chosen: list[list[int]] = [[] for _ in entries]
    at_once = [index for index, entry in enumerate(entries) if entry.row not in stateful]
    if at_once:
        places = [(index, offset) for index in at_once for offset in range(counts[index])]
        sampled_at_once = iter(_sample(sampler, logits, entries, firsts, places))
        for index in at_once:
            sampled = [next(sampled_at_once) for _ in range(counts[index])]
            chosen[index] = sampled[: _num_right(entries[index].draft_ids, sampled) + 1]
    # What a stateful row may sample depends on the tokens before: one place after the other.
    going = [index for index, entry in enumerate(entries) if entry.row in stateful]
    offset = 0
    while going:
        tokens = _sample(sampler, logits, entries, firsts, [(index, offset) for index in going])
        sampler.accept([entries[index].row for index in going], tokens)
        still_right = []
        for index, token_id in zip(going, tokens, strict=True):
            if sampler.has_failed(entries[index].row):
                continue
            chosen[index].append(token_id)
            if entries[index].draft_ids[offset : offset + 1] == [token_id]:
                still_right.append(index)
        going = still_right
        offset += 1
    return chosen


def _sample(
    sampler: Sampler,
    logits: Tensor,
    entries: Sequence[ScheduledTokens],
    firsts: Sequence[int],
    places: Sequence[tuple[int, int]],
) -> list[int]:
    """One token for each (entry, offset among its sampled places)."""
    if len(places) < len(logits):
        at = [firsts[index] + offset for index, offset in places]
        logits = logits.index_select(0, upload_one(at, np.int64, logits.device))
    rows = [entries[index].row for index, _ in places]
    numbers = [(entries[index].num_output or 0) + offset for index, offset in places]
    chosen: list[int] = sampler.sample(logits, rows, numbers).tolist()
    return chosen


def _num_right(drafts: Sequence[int], sampled: Sequence[int]) -> int:
    """How many of the first drafts were sampled in their places."""
    count = 0
    while count < len(drafts) and drafts[count] == sampled[count]:
        count += 1
    return count
