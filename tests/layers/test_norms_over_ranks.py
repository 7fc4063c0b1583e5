"""Each rank has some columns; the norm is that of whole rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.layers.build import Build
from sapwood.layers.norm import RMSNorm
from sapwood.layers.norms_over_ranks import GatedNormOverRanks, NormsOverRanks
from tests.models.lm.rank_threads import on_ranks

KERNELS = ReferenceKernels()
BUILD = Build(kernels=KERNELS, device=torch.device("cpu"), dtype=torch.float32)
SIZE, HEAD = 32, 8
"""Four ranks have 8 columns of queries each, and two of them the same head of keys, of two."""


def random(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_heads_that_several_ranks_have_count_once() -> None:
    q, k = random(5, SIZE, seed=0), 3 * random(5, 2 * HEAD, seed=1)
    weights = random(SIZE, seed=2), random(2 * HEAD, seed=3)

    def run(group: Group) -> list[Tensor]:
        places = group.rank * HEAD, group.rank // 2 * HEAD
        norms = [
            RMSNorm(BUILD, HEAD, eps=1e-6).part_of(len(weight), first)
            for weight, first in zip(weights, places, strict=True)
        ]
        for norm, weight in zip(norms, weights, strict=True):
            norm.targets()["weight"].place(weight)
        own = [x[:, first : first + HEAD] for x, first in zip((q, k), places, strict=True)]
        return NormsOverRanks(group, norms)(own)

    found = on_ranks(4, run)
    wanted = KERNELS.rms_norm(q, weights[0], 1e-6), KERNELS.rms_norm(k, weights[1], 1e-6)
    torch.testing.assert_close(torch.cat([one[0] for one in found], dim=-1), wanted[0])
    for rank, (_, keys) in enumerate(found):
        torch.testing.assert_close(keys, wanted[1].chunk(2, dim=-1)[rank // 2])


@pytest.mark.parametrize("num_groups", [1, 2])
@pytest.mark.parametrize("logistic", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_a_gated_norm_of_groups_that_ranks_share(
    num_groups: int, logistic: bool, norm_first: bool
) -> None:
    x, gate, weight = random(5, SIZE, seed=0), random(5, SIZE, seed=1), random(SIZE, seed=2)
    form = GatedNormForm(
        group=SIZE // num_groups, eps=1e-5, norm_first=norm_first, logistic=logistic
    )

    def run(group: Group) -> Tensor:
        own = [one.chunk(group.size, dim=-1)[group.rank] for one in (x, gate, weight)]
        return GatedNormOverRanks(group, form, num_groups)(*own)

    found = torch.cat(on_ranks(4, run), dim=-1)
    torch.testing.assert_close(found, KERNELS.gated_rms_norm(x, gate, weight, form))
