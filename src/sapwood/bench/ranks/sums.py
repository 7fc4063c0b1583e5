"""How much sooner do ranks have a sum in shared memory than over gloo?"""

from __future__ import annotations

from functools import partial

import torch

from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.ranks.paired import Paired, time_in_turn
from sapwood.distributed.groups import Group
from sapwood.kernels.kv_cache import DTYPES


def measure_sums(options: RanksOptions, memory: Group, gloo: Group) -> list[Paired]:
    """The sums of rows that layers end with, by number of rows. RuntimeError if they differ.

    memory, gloo  the same ranks, with shared memory and without
    """
    found = []
    for num_rows in options.sizes:
        generator = torch.Generator().manual_seed(options.seed + memory.rank)
        x = torch.randn(num_rows, options.width, generator=generator).to(DTYPES[options.dtype])
        _check_equal(x, memory, gloo)
        buffer = torch.zeros_like(x)  # which stays zero, however often it is added up
        found.append(
            time_in_turn(
                num_rows,
                partial(memory.all_reduce, buffer),
                partial(gloo.all_reduce, buffer),
                meet=lambda: gloo.all_reduce(torch.zeros(1)),
                turns=options.turns,
                calls=options.calls,
            )
        )
    return found


def _check_equal(x: torch.Tensor, memory: Group, gloo: Group) -> None:
    tolerance = 2.0 ** (-6 if x.dtype == torch.bfloat16 else -18) * memory.size
    own, other = (group.all_reduce(x.clone()).float() for group in (memory, gloo))
    if not torch.allclose(own, other, rtol=tolerance, atol=tolerance):
        raise RuntimeError("sums in shared memory are not those of gloo")
