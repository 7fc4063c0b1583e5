"""Chooses the tokens of requests of which some have drafts, and tells which drafts were right.

A draft is right if it is the token that is sampled in its place: with the random number that this
place has in the request, and with penalties and grammars as they are after the tokens before it.
So drafts change how many steps an output takes, and never the output: exact-match verification.
Only a sampler with thresholds (`acceptance`) is told the drafts, and may choose one of them.
Drafts may be a tree: the drafts that were right are then the way through it from its root on.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from torch import Tensor

from sapwood.executor.sampling.sampler import Sampler
from sapwood.kernels.transfer import upload_one
from sapwood.schema.draft_tree import child_of, children_of
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
            chosen[index] = _along(entries[index], sampled)
    # What a stateful row may sample depends on the tokens before: one place after the other.
    going = [(index, 0) for index, entry in enumerate(entries) if entry.row in stateful]
    while going:
        tokens = _sample(sampler, logits, entries, firsts, going)
        sampler.accept([entries[index].row for index, _ in going], tokens)
        still_right = []
        for (index, offset), token_id in zip(going, tokens, strict=True):
            if sampler.has_failed(entries[index].row):
                continue
            chosen[index].append(token_id)
            following = _place_after(entries[index], offset, token_id)
            if following is not None:
                still_right.append((index, following))
        going = still_right
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
    depths = {index: entries[index].sampled_depths for index in {index for index, _ in places}}
    numbers = [(entries[index].num_output or 0) + depths[index][offset] for index, offset in places]
    guesses: list[list[int]] = []
    if sampler.takes_guesses:
        following = {
            index: children_of(entries[index].draft_ids, entries[index].draft_parents)
            for index in depths
        }
        guesses = [following[index][offset] for index, offset in places]
    chosen: list[int] = sampler.sample(logits, rows, numbers, guesses).tolist()
    return chosen


def _along(entry: ScheduledTokens, sampled: Sequence[int]) -> list[int]:
    """Of the tokens sampled after each place of an entry, those on the way of its right drafts."""
    found: list[int] = []
    place: int | None = 0
    while place is not None:
        found.append(sampled[place])
        place = _place_after(entry, place, sampled[place])
    return found


def _place_after(entry: ScheduledTokens, place: int, token_id: int) -> int | None:
    """The sampled place of the draft that follows a place and is this token; None: there is none.
    Place 0 is that of the last known token."""
    draft = child_of(entry.draft_ids, entry.draft_parents, place - 1, token_id)
    return None if draft is None else draft + 1
