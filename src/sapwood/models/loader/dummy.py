"""Random weights, for measuring speed without a checkpoint."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sapwood.layers.targets import Target

_POOL_SIZE = 1_048_573
"""Random numbers that are drawn once and then repeated.

The number is a prime, so that no row's width divides it and no two rows of a matrix are alike.
"""


def random_weights(
    targets: Mapping[str, Target], *, seed: int, dtype: torch.dtype, std: float = 0.02
) -> Iterator[tuple[str, Tensor]]:
    """A tensor for every target of a model: the same seed and targets give the same numbers.

    Weights of norms are 1, biases 0, everything else normal numbers of mean 0 and standard
    deviation `std`.
    """
    generator = torch.Generator().manual_seed(seed)
    pool = torch.empty(_POOL_SIZE).normal_(0.0, std, generator=generator).to(dtype)
    offset = 0
    for name, target in targets.items():
        if name.endswith("bias"):
            yield name, torch.zeros(target.shape, dtype=dtype)
        elif len(target.shape) == 1:
            yield name, torch.ones(target.shape, dtype=dtype)
        else:
            count = math.prod(target.shape)
            copies = -(-(offset + count) // _POOL_SIZE)
            yield name, pool.repeat(copies)[offset : offset + count].view(target.shape)
            offset = (offset + count) % _POOL_SIZE
