"""The input of one forward pass on one rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """

    at: Tensor
    vectors: Tensor


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
    embeds         vectors that replace the embeddings of some tokens; None: of no token
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
    embeds: InputEmbeds | None = None
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

    def inputs_of(self, layer: int) -> CacheInputs | ForwardBatch:
        """The write_index and attention of this layer."""
        return self.groups[self.group_of_layer[layer]] if self.groups else self

    def slots_of(self, layer: int) -> Tensor:
        """[R] int64: where each request's state in this layer is; the layer must keep states."""
        slots = self.groups[self.group_of_layer[layer]].slots if self.groups else None
        assert slots is not None, f"layer {layer} keeps no states"
        return slots
