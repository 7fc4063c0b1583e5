"""What the inputs of linear layers are like, over a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sapwood.models.convert.scheme import WeightScheme
from sapwood.models.convert.tapped import TappedLinear, rounded_inputs
from sapwood.models.convert.walk import TappedLayer, Walk

SAMPLE_ROWS = 1024
"""Inputs that are kept as they are, over all windows."""


class InputSample:
    """Of one linear layer.

    largest  [in] fp32, the largest magnitude of each entry
    """

    def __init__(self, in_size: int, device: torch.device, *, num_windows: int) -> None:
        self.largest = torch.zeros(in_size, device=device)
        self._rows_per_window = -(-SAMPLE_ROWS // num_windows)
        self._kept: list[Tensor] = []

    def add(self, x: Tensor) -> None:
        """x [T, in]: the inputs of one window."""
        wide = x.float()
        self.largest = torch.maximum(self.largest, wide.abs().amax(dim=0))
        step = max(1, len(wide) // self._rows_per_window)
        self._kept.append(wide[::step].clone())

    @property
    def rows(self) -> Tensor:
        """[n, in] fp32: some inputs of every window."""
        return torch.cat(self._kept)


class Moments:
    """Sums over the inputs x of one linear layer, which it gets as r: rounded, if the scheme does.

    hessian  [in, in] fp32, the sum of r r^T
    lost     [in, in] fp32, the sum of (x - r) r^T; None if nothing is rounded
    """

    def __init__(self, in_size: int, device: torch.device, scheme: WeightScheme) -> None:
        self._scheme = scheme
        self.hessian = torch.zeros(in_size, in_size, device=device)
        self.lost = torch.zeros_like(self.hessian) if scheme.rounds_activations else None

    def add(self, x: Tensor) -> None:
        """x [T, in]"""
        wide = x.float()
        seen = wide
        if self.lost is not None:
            seen = rounded_inputs(wide, self._scheme)
            self.lost.addmm_((wide - seen).t(), seen)
        self.hessian.addmm_(seen.t(), seen)


def sample_inputs(
    walk: Walk, layer: TappedLayer, hidden: Sequence[Tensor]
) -> dict[str, InputSample]:
    """Of a decoder layer's linear layers, by the name of their first part."""
    found = {
        linear.names[0]: InputSample(linear.in_size, hidden[0].device, num_windows=len(hidden))
        for linear in layer.linears
    }
    _watch(walk, layer, hidden, {name: one.add for name, one in found.items()})
    return found


def input_moments(
    walk: Walk, layer: TappedLayer, hidden: Sequence[Tensor], scheme: WeightScheme
) -> dict[str, Moments]:
    """Likewise."""
    found = {
        linear.names[0]: Moments(linear.in_size, hidden[0].device, scheme)
        for linear in layer.linears
    }
    _watch(walk, layer, hidden, {name: one.add for name, one in found.items()})
    return found


def _watch(
    walk: Walk,
    layer: TappedLayer,
    hidden: Sequence[Tensor],
    watchers: Mapping[str, Callable[[Tensor], None]],
) -> None:
    for linear in layer.linears:
        linear.watch = watchers[linear.names[0]]
    walk.run(layer, hidden)
    for linear in layer.linears:
        linear.watch = None


def parts_of(linear: TappedLinear) -> list[tuple[str, Tensor]]:
    """(name, weight [out, in] fp32) of each checkpoint tensor of a layer."""
    return [
        (name, weight.float()) for name, weight in zip(linear.names, linear.weights, strict=True)
    ]
