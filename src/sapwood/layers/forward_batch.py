"""The input of one forward pass on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.adapters import StepAdapters

Work = Callable[..., Tensor]
"""Called with a ForwardBatch and some tensors with a row per token; returns another one."""


@dataclass(frozen=True, slots=True)
class InputEmbeds:
    """Vectors that replace the embeddings of E tokens of a step.

    at       [E] int64; indices of these tokens among the T tokens of the step
    vectors  [E, hidden], of any floating-point dtype
    later    [E, hidden] each: what is added to the same tokens' hidden states after the first
             layers, one layer after another
    """

    at: Tensor
    vectors: Tensor
    later: tuple[Tensor, ...] = ()


@dataclass(frozen=True, slots=True)
class AxisPositions:
    """Positions in time, height and width, each of which turns some pairs of a head's entries.

    positions     [3, T] int64
    axis_of_pair  [pairs that are rotated] int64: which of the three
    Source  Wang et al. 2024, arXiv:2409.12191"""

    positions: Tensor
    axis_of_pair: Tensor

    def table(self, cos_sin: Tensor) -> Tensor:
        """From a table of cosines and sines by position to one by token: [T, rotary_dim]"""
        pairs = cos_sin.shape[1] // 2
        rows = self.positions[self.axis_of_pair[:pairs]].T
        return torch.cat(
            [half.gather(0, rows) for half in torch.split(cos_sin, pairs, dim=1)], dim=1
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheInputs:
    """What the layers of one cache group (schema/cache.py) need to know of a step.

    write_index  [T] int64; place of a token's KV in the group's pages: page * page_size + offset
    attention    says which keys each token attends to
    slots        [R] int64; the slots of the requests' states, in a group of states; a request whose
                 context is as long as its new tokens begins without a state. None in other groups
    """

    write_index: Tensor
    attention: AttentionBatch
    slots: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardBatch:
    """T new tokens of R requests, in the order of the requests.

    token_ids      [T] int64
    positions      [T] int64; a token's index in its request; in long texts of a model that rotates
                   these otherwise, plus the length up to which a text is short (layers/rotary)
    write_index    [T] int64; place of a token's KV: page * page_size + offset
    attention      says which keys each token attends to
    groups         what each cache group needs instead of these two; empty: there is one group, of
                   pages
    group_of_layer  per layer: the index of its group in `groups`
    kv_caches      per layer its group's tensors, in the group's order: (keys, values), each
                   [num_pages, Hk, page_size, D], or in 8 bits; or what else the group says
    logits_index   [S] int64; indices of the tokens whose logits are wanted
    token_types    [T] int64: which text of a pair each token belongs to; None: there are no pairs
    axes           positions of tokens whose three positions differ; None: no token's do
    embeds         vectors that replace the embeddings of some tokens; None: of no token
    across         by request: vectors of a sound that layers attend to across, [layers, 2 (keys,
                   values), heads, vectors, head_dim]; None: it has none; (): no request has any
    adapters       which rows have which LoRA adapter; None: no row has one
    between        called instead of what is given to `by_request`, when a step is recorded in
                   pieces between which that runs
    """

    token_ids: Tensor
    positions: Tensor
    write_index: Tensor
    attention: AttentionBatch
    kv_caches: Sequence[tuple[Tensor, ...]]
    logits_index: Tensor
    token_types: Tensor | None = None
    axes: AxisPositions | None = None
    embeds: InputEmbeds | None = None
    across: Sequence[Tensor | None] = ()
    between: Callable[[Work, tuple[Tensor, ...]], Tensor] | None = None
    adapters: StepAdapters | None = None
    groups: Sequence[CacheInputs] = ()
    group_of_layer: Sequence[int] = ()

    def by_request(self, work: Work, *rows: Tensor) -> Tensor:
        """work(batch, *rows), for work that depends on which tokens belong to which request.

        Where a step is recorded in pieces, this ends a piece: the work is done anew for the batch
        of each step. `work` uses nothing but the batch, the rows and what is always the same, and
        its result is used up before the next such call.

        rows     [T, ...] each
        Returns  [T, ...]"""
        if self.between is None:
            return work(self, *rows)
        return self.between(work, rows)

    def rotation(self, cos_sin: Tensor) -> tuple[Tensor, Tensor]:
        """(a table of cosines and sines, [T] each token's row of it), from a table by position."""
        if self.axes is None:
            return cos_sin, self.positions
        cache, key = self.attention.cache, f"rotation {id(cos_sin)}"
        if key not in cache:
            rows = torch.arange(len(self.positions), device=self.positions.device)
            cache[key] = self.axes.table(cos_sin), rows
        found: tuple[Tensor, Tensor] = cache[key]
        return found

    def inputs_of(self, layer: int) -> CacheInputs | ForwardBatch:
        """The write_index and attention of this layer."""
        return self.groups[self.group_of_layer[layer]] if self.groups else self

    def slots_of(self, layer: int) -> Tensor:
        """[R] int64: where each request's state in this layer is; the layer must keep states."""
        slots = self.groups[self.group_of_layer[layer]].slots if self.groups else None
        assert slots is not None, f"layer {layer} keeps no states"
        return slots
