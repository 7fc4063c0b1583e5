"""Which new tokens of its request a token does not see, where these are a tree."""

from __future__ import annotations

import torch
from torch import Tensor

BITS = 64
"""Of an int64: new tokens of a request that are a tree, at most."""


def unseen(sees: Tensor) -> Tensor:
    """sees [n] int64, of one request's new tokens -> [n, n] bool: token i does not see token j,
    though j may come before i. It says nothing of tokens after i, nor after the first BITS.
    """
    num = min(len(sees), BITS)
    bits = sees[:, None] >> torch.arange(num, device=sees.device)
    hidden = torch.zeros(len(sees), len(sees), dtype=torch.bool, device=sees.device)
    hidden[:, :num] = (bits & 1) == 0
    return hidden
