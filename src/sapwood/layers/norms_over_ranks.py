"""RMS norms of rows whose columns ranks share: each rank has some, and the norm is of all.

Each rank has equally many columns, and where several have the same ones, all of them are as often
there. So the mean of all squares is the mean of the ranks' own means, and one small sum over the
ranks tells it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.state_forms import GatedNormForm
from sapwood.layers.norm import RMSNorm


class NormsOverRanks:
    """Norms of several tensors, whose sums over the ranks are one exchange."""

    def __init__(self, group: Group, norms: Sequence[RMSNorm]) -> None:
        """norms: each with this rank's entries of a weight"""
        self._group = group
        self._norms = norms

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """[T, this rank's columns] for each of the norms -> the same shapes"""
        wide = [x.float() for x in tensors]
        means = torch.stack([x.square().mean(dim=-1) for x in wide], dim=-1)
        means = self._group.all_reduce(means) / self._group.size
        return [
            (x * torch.rsqrt(mean.unsqueeze(-1) + norm.eps) * norm.weight.float()).to(own.dtype)
            for own, x, mean, norm in zip(
                tensors, wide, means.unbind(dim=-1), self._norms, strict=True
            )
        ]


class GatedNormOverRanks:
    """A gated norm of groups of columns; several neighbouring ranks share a group."""

    def __init__(self, group: Group, form: GatedNormForm, num_groups: int) -> None:
        """num_groups: of the whole row, fewer than ranks"""
        assert group.size % num_groups == 0, "each group has equally many ranks"
        self._group = group
        self._form = form
        self._num_groups = num_groups
        self._sharing = group.size // num_groups

    def __call__(self, x: Tensor, gate: Tensor, weight: Tensor) -> Tensor:
        """As Kernels.gated_rms_norm, of this rank's columns."""
        form = self._form
        wide, gates = x.float(), gate.float()
        factor = torch.sigmoid(gates) if form.logistic else F.silu(gates)
        if not form.norm_first:
            wide = wide * factor
        # A column for each group: of other groups this rank adds nothing.
        means = wide.new_zeros((x.shape[0], self._num_groups))
        own = self._group.rank // self._sharing
        means[:, own] = wide.square().mean(dim=-1)
        mean = self._group.all_reduce(means)[:, own, None] / self._sharing
        out = wide * torch.rsqrt(mean + form.eps) * weight.float()
        return (out * factor if form.norm_first else out).to(x.dtype)
