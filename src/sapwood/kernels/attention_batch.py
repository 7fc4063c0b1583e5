"""What attention is told of a step: which keys each token attends to, and how."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class SeenBothWays:
    """New tokens of one request that see one another, later ones too: those of a picture.

    request      whose they are
    start, end   their rows in q
    first        position of the first of them; those before are seen as ever
    """

    request: int
    start: int
    end: int
    first: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Which keys each new token attends to. Made once per step, used by every layer.

    Requests come in the order of their new tokens; the first `num_decodes` have exactly one each.

    page_table      [R, max_pages] int32; page_table[r, i] holds tokens i*page_size .. of request r;
                    unused entries are 0 (a valid page, so that a gather of them is harmless). Where
                    attention has a window, entries of pages before it may be anything: such pages
                    may have been given away
    query_start     [R + 1] int32; the new tokens of request r are the rows from query_start[r] on,
                    up to query_start[r + 1]
    context_len     [R] int32; tokens of request r whose KV is in the cache after this step; its new
                    tokens are the last ones, and attention is causal among them
    query_lens      the same lengths on the host, as Python ints
    context_lens    the same, on the host
    cache           what an implementation computes once per step and reuses in every layer
    host_page_table page_table on the host, for implementations that look for pages which several
                    requests share; None: it is not at hand, or not to be looked at
    sees            [T] int64, for requests whose new tokens are a tree (schema/draft_tree.py):
                    bit j of a token is 1 if it sees its request's new token j, itself included.
                    A token that sees all new tokens up to itself has -1; so have all tokens of a
                    request with more than 64 new ones. Earlier tokens are always seen.
                    `paged_attention` without a window and without ALiBi takes it, no other
                    attention does. None: every token has -1
    both_ways       tokens that see later ones too. No implementation of `paged_attention` looks at
                    it: layers compute these rows again (layers/both_ways.py)
    """

    page_table: Tensor
    query_start: Tensor
    context_len: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_decodes: int
    cache: dict[str, Any] = field(default_factory=dict)
    host_page_table: NDArray[np.int32] | None = None
    sees: Tensor | None = None
    both_ways: tuple[SeenBothWays, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionTraits:
    """What the attention of a layer does beyond scores, causal mask and softmax.

    window    a token sees the last `window` tokens, itself included; None: all (Beltagy et al.
              2020, arXiv:2004.05150)
    soft_cap  a scaled score s becomes soft_cap * tanh(s / soft_cap) before it is masked; None: it
              stays as it is (Gemma Team 2024, arXiv:2408.00118)
    sinks     [Hq] fp32, one more score per query head, which has no value: it only takes its share
              of the softmax (OpenAI 2025, arXiv:2508.10925); None: there are none
    alibi     [Hq] fp32 slopes: slope * (position of the key - position of the query) is added to a
              scaled and capped score (Press et al. 2021, arXiv:2108.12409); None: nothing is
    Raises    ValueError if window or soft_cap is not positive

    sinks and alibi are contiguous.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    alibi: Tensor | None = None

    def __post_init__(self) -> None:
        for name, number in (("window", self.window), ("soft_cap", self.soft_cap)):
            if number is not None and number <= 0:
                raise ValueError(f"{name} must be positive, got {number}; None means without it")

    @property
    def features(self) -> frozenset[str]:
        """Their names, as `Need.attention` has them; empty if attention is plain."""
        there = {
            SLIDING_WINDOW: self.window, SOFT_CAP: self.soft_cap, SINKS: self.sinks,
            ALIBI: self.alibi,
        }  # fmt: skip
        return frozenset(name for name, value in there.items() if value is not None)


SLIDING_WINDOW = "sliding window"
SOFT_CAP = "logit soft cap"
SINKS = "attention sinks"
ALIBI = "ALiBi"
LATENT = "latent rows"
"""The layers call `latent_attention`; a feature that no trait stands for."""
CHOSEN_KEYS = "attention to chosen keys"
"""The layers call `choose_keys` and `sparse_latent_attention`; likewise."""
PLAIN = AttentionTraits()


def lacking(features: frozenset[str], has: frozenset[str]) -> str | None:
    """Why kernels whose attention `has` certain features cannot serve those that are needed; None
    if they can."""
    missing = sorted(features - has)
    return f"its attention has no {' and no '.join(missing)}" if missing else None


class CapturedSharing(Protocol):
    """Pages that several requests of a captured decode share: found on the host before a replay,
    and read once by what was captured."""

    def install(self, batch: AttentionBatch) -> None:
        """Attention to `batch`, which is captured, is to follow the plan of each replay."""
        ...

    def plan(self, batch: AttentionBatch) -> bool:
        """For the step that is replayed next. False, and nothing done, if sharing saves nothing
        worth it: then a capture without this is to be replayed."""
        ...
