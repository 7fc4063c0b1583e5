"""What the inputs of a linear layer are like, over a calibration text."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sapwood.models.convert.tapped import TappedLinear
from sapwood.models.convert.walk import TappedLayer, Walk

SAMPLE_ROWS = 1024
"""Inputs that are kept as they are, over all windows."""


class InputStatistics:
    """Of one linear layer.

    hessian  [in, in] fp32, the sum of x x^T over all inputs x; None if it is not wanted
    largest  [in] fp32, the largest magnitude of each entry
    sample   [n, in] fp32, some inputs of every window
    """

    def __init__(
        self, in_size: int, device: torch.device, *, with_hessian: bool, num_windows: int
    ) -> None:
        self.hessian = torch.zeros(in_size, in_size, device=device) if with_hessian else None
        self.largest = torch.zeros(in_size, device=device)
        self._rows_per_window = -(-SAMPLE_ROWS // num_windows)
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x [T, in]: the inputs of one window."""
        wide = x.float()
        if self.hessian is not None:
            self.hessian.addmm_(wide.t(), wide)
        self.largest = torch.maximum(self.largest, wide.abs().amax(dim=0))
        step = max(1, len(wide) // self._rows_per_window)
        self._kept.append(wide[::step].clone())

    @property
    def sample(self) -> Tensor:
        return torch.cat(self._kept)

    def divide(self, factors: Tensor) -> None:
        """As if all inputs had been divided by these factors [in]."""
        if self.hessian is not None:
            self.hessian /= factors[:, None] * factors
        self.largest /= factors
        self._kept = [kept / factors for kept in self._kept]


def observe(
    walk: Walk, layer: TappedLayer, hidden: Sequence[Tensor], *, with_hessians: bool
) -> dict[str, InputStatistics]:
    """Statistics of a decoder layer's linear layers by the name of their first part."""
    found = {
        linear.names[0]: InputStatistics(
            linear.in_size,
            hidden[0].device,
            with_hessian=with_hessians,
            num_windows=len(hidden),
        )
        for linear in layer.linears
    }
    for linear in layer.linears:
        linear.watch = found[linear.names[0]].add
    walk.run(layer, hidden)
    for linear in layer.linears:
        linear.watch = None
    return found


def parts_of(linear: TappedLinear) -> list[tuple[str, Tensor]]:
    """(name, weight [out, in] fp32) of each checkpoint tensor of a layer."""
    return [
        (name, weight.float()) for name, weight in zip(linear.names, linear.weights, strict=True)
    ]
