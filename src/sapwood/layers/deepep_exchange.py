"""Sends tokens to the ranks that have their experts with DeepEP, between GPUs of one machine."""

from __future__ import annotations

from torch import Tensor

from sapwood.distributed.deepep import Buffer
from sapwood.layers.expert_exchange import Mix


class DeepEPExchange:
    """An `ExpertExchange`, in DeepEP's normal mode: it waits on the host for the counts."""

    def __init__(self, buffer: Buffer, num_ranks: int) -> None:
        self._buffer = buffer
        self._num_ranks = num_ranks

    def __call__(
        self, x: Tensor, slots: Tensor, weights: Tensor, mix: Mix, *, num_own: int
    ) -> Tensor:
        chosen = slots.masked_fill(weights == 0, -1)
        per_rank, per_remote, per_slot, goes_to, _ = self._buffer.get_dispatch_layout(
            chosen, num_own * self._num_ranks
        )
        taken, own_slots, own_weights, _, handle, _ = self._buffer.dispatch(
            x.contiguous(),
            num_tokens_per_rank=per_rank,
            num_tokens_per_rdma_rank=per_remote,
            is_token_in_rank=goes_to,
            num_tokens_per_expert=per_slot,
            topk_idx=chosen,
            topk_weights=weights.contiguous(),
        )
        given = taken
        if len(taken):
            is_elsewhere = own_slots < 0
            given = mix(
                taken,
                own_slots.masked_fill(is_elsewhere, 0),
                own_weights.masked_fill(is_elsewhere, 0.0),
            )
        total, _, _ = self._buffer.combine(given.contiguous(), handle)
        return total
