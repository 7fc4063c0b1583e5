"""Which decodes attend to shared pages together."""

from __future__ import annotations

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.shared_prefixes import find_shared_prefixes

_LEAST_ROWS = 12
"""Query rows (requests x query heads of a group) from which on repacking keys for all of them costs
less than reading the keys once for each request."""

_LEAST_KEYS = 128
"""With fewer shared keys, there is not enough to save."""


def groups_of_decodes(
    batch: AttentionBatch, page_size: int, num_group_heads: int
) -> list[tuple[tuple[int, ...], int]]:
    """(requests, pages that all of them begin with) of each group for which that is worth it.

    Only requests with one new token are looked at: the rows of longer ones fill tiles by
    themselves. Nothing is found without `batch.host_page_table`."""
    if batch.host_page_table is None or batch.num_decodes * num_group_heads < _LEAST_ROWS:
        return []
    limits = [(context - 1) // page_size for context in batch.context_lens[: batch.num_decodes]]
    return [
        (group.requests, group.num_pages)
        for group in find_shared_prefixes(batch.host_page_table, limits)
        if len(group.requests) * num_group_heads >= _LEAST_ROWS
        and group.num_pages * page_size >= _LEAST_KEYS
    ]
