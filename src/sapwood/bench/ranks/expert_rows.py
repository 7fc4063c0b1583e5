"""How much sooner do rows get to their experts and back if ranks send them only where they must?

Beside it the other way: all ranks gather all rows, and add up what their own experts give. Experts
here only weigh a row, so that nothing but the exchange takes time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.ranks.paired import Paired, time_in_turn
from sapwood.distributed.groups import Group
from sapwood.kernels.kv_cache import DTYPES
from sapwood.layers.expert_exchange import GroupExchange
from sapwood.layers.shared_rows import SharedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Routed:
    """The rows of one rank and where they go, as in ExpertExchange."""

    x: Tensor
    slots: Tensor
    weights: Tensor

    @staticmethod
    def of(options: RanksOptions, num_rows: int, rank: int) -> Routed:
        generator = torch.Generator().manual_seed(options.seed + rank)
        order = torch.rand(num_rows, options.num_experts, generator=generator).argsort(dim=1)
        weights = torch.rand(num_rows, options.num_chosen, generator=generator)
        return Routed(
            x=torch.randn(num_rows, options.width, generator=generator).to(DTYPES[options.dtype]),
            slots=order[:, : options.num_chosen].contiguous(),
            weights=weights / weights.sum(dim=1, keepdim=True),
        )


def measure_expert_rows(options: RanksOptions, group: Group, counting: Group) -> list[Paired]:
    """Both ways by number of rows; RuntimeError if their results differ.

    group     the ranks
    counting  the same ranks, which exchange numbers in the host's memory
    """
    num_own = options.num_experts // group.size
    exchange = GroupExchange(group, counting)
    found = []
    for num_rows in options.sizes:
        ranks = [Routed.of(options, num_rows, rank) for rank in range(group.size)]
        own = ranks[group.rank]
        shared = SharedRows(
            group,
            counting,
            width=options.width,
            dtype=own.x.dtype,
            device=own.x.device,
        )
        shared.begin(num_rows)
        # Every rank routes the rows of all, so that it knows this without being told.
        slots = torch.cat([rank.slots for rank in ranks])
        is_here = slots // num_own == group.rank
        here = (torch.cat([rank.weights for rank in ranks]) * is_here).sum(dim=1, keepdim=True)

        def send(own: Routed = own) -> Tensor:
            return exchange(own.x, own.slots, own.weights, _weigh, num_own=num_own)

        def gather(own: Routed = own, shared: SharedRows = shared, here: Tensor = here) -> Tensor:
            rows = shared.gathered(own.x)
            return shared.own(group.all_reduce((rows * here).to(rows.dtype)))

        tolerance = 2.0 ** (-6 if own.x.dtype == torch.bfloat16 else -18) * group.size
        if not torch.allclose(send().float(), gather().float(), rtol=tolerance, atol=tolerance):
            raise RuntimeError("rows that were sent to their experts come back as others")
        found.append(
            time_in_turn(
                num_rows,
                send,
                gather,
                meet=lambda: group.all_reduce(torch.zeros(1)),
                turns=options.turns,
                calls=options.calls,
            )
        )
    return found


def _weigh(x: Tensor, slots: Tensor, weights: Tensor) -> Tensor:
    del slots
    return (x * weights.sum(dim=1, keepdim=True)).to(x.dtype)
