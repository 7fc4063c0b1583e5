"""Adapters of a model whose rows all have the same ones: a diffusion model's.

They are computed beside the weights: a layer without them has the very numbers that it had before,
also where its weights are quantised."""

from __future__ import annotations

from torch import Tensor

from sapwood.kernels.interface import Kernels
from sapwood.kernels.low_rank import LowRank
from sapwood.layers.adapters import AdapterContext, AdapterSite


class SteadySite(AdapterSite):
    """A linear layer with one addition for all rows, of which slots are not told apart."""

    def __init__(self, in_size: int, out_size: int) -> None:
        self.is_recorded = False
        self._sizes = (in_size, out_size)
        self._addition: LowRank | None = None

    def place(self, slot: int, addition: LowRank | None) -> None:
        """As AdapterSite.place; the parts may have outputs in common."""
        if addition is not None:
            addition.check(*self._sizes)
        self._addition = addition

    def add(self, x: Tensor, out: Tensor) -> None:
        """As AdapterSite.add."""
        own = self._addition
        if own is None:
            return
        narrow = x @ own.a.t()
        for part in own.parts:
            rank, num_outputs = part.b.shape
            outputs = out[:, part.first_out : part.first_out + num_outputs]
            outputs.addmm_(narrow[:, part.first_rank : part.first_rank + rank], part.b)


class SteadyAdapters(AdapterContext):
    """Makes such sites."""

    def site(self, kernels: Kernels, in_size: int, out_size: int) -> AdapterSite:
        """As AdapterContext.site."""
        return SteadySite(in_size, out_size)
