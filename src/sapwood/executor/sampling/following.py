"""The choice of tokens on a rank that leaves it to another."""

from __future__ import annotations

import torch
from torch import Tensor

from sapwood.kernels.sampling_settings import SamplingSettings


class FollowingOps:
    """Token 0 for every row. Rank 0 alone has the grammars, penalties and random numbers of
    requests: what it chooses comes with the next plan, or by `Runner`'s `share`."""

    def argmax(self, logits: Tensor) -> Tensor:
        return torch.zeros(len(logits), dtype=torch.int64, device=logits.device)

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        return self.argmax(logits)
