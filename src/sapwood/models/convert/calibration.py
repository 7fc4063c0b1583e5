"""Statistics of the inputs of linear layers over a calibration text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from sapwood.models.convert.scheme import WeightScheme
from sapwood.models.convert.tapped import TappedLinear, rounded_inputs
from sapwood.models.convert.walk import TappedLayer, Walk

SAMPLE_ROWS = 1024
"""Input vectors of a layer that are kept, over all windows together."""


class InputSample:
    """Some inputs of one linear layer.

    largest  [in] fp32, the largest magnitude of each entry over all inputs
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
        """The kept inputs, [n, in] fp32, some of every window."""
        return torch.cat(self._kept)


class Moments:
    """Sums over the tokens of the calibration text.

    A converted linear layer gets the input r, which is rounded if the scheme rounds activations.
    Its output should be the one that the original layer has for the input x.

    hessian  [in, in] fp32, the sum of r r^T
    lost     [in, in] fp32, the sum of (x - r) r^T
    """

    def __init__(self, in_size: int, device: torch.device, scheme: WeightScheme) -> None:
        self._scheme = scheme
        self.hessian = torch.zeros(in_size, in_size, device=device)
        self.lost = torch.zeros_like(self.hessian)

    def add(self, wanted: Tensor, received: Tensor) -> None:
        """Add the inputs of some tokens: x, and r before the rounding, each [T, in]."""
        seen = received.float()
        if self._scheme.rounds_activations:
            seen = rounded_inputs(seen, self._scheme)
        self.lost.addmm_((wanted.float() - seen).t(), seen)
        self.hessian.addmm_(seen.t(), seen)


def sample_inputs(
    walk: Walk, layer: TappedLayer, hidden: Sequence[Tensor]
) -> dict[str, InputSample]:
    """Input samples of a decoder layer's linear layers, by the name of their first part."""
    found = {
        linear.names[0]: InputSample(linear.in_size, hidden[0].device, num_windows=len(hidden))
        for linear in layer.linears
    }
    with _watched(layer.linears, [found[linear.names[0]].add for linear in layer.linears]):
        walk.run(layer, hidden)
    return found


def run_keeping_inputs(
    walk: Walk, layer: TappedLayer, hidden: Sequence[Tensor]
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """`Walk.run`, and also the inputs [T, in] of each linear layer for each window."""
    kept: list[list[Tensor]] = [[] for _ in layer.linears]
    with _watched(layer.linears, [partial(_keep, inputs) for inputs in kept]):
        return walk.run(layer, hidden), kept


def input_moments(
    walk: Walk,
    layer: TappedLayer,
    linear: TappedLinear,
    hidden: Sequence[Tensor],
    originals: Sequence[Tensor] | None,
    scheme: WeightScheme,
) -> Moments:
    """The moments of one linear layer; earlier linear layers of the decoder layer are converted.

    originals  the layer's inputs in the original model, for each window, to which it is fitted;
               None: it is fitted to its inputs now, before they are rounded
    """
    moments = Moments(linear.in_size, hidden[0].device, scheme)
    waiting = iter(originals or ())
    with _watched([linear], [lambda x: moments.add(next(waiting, x), x)]):
        walk.run(layer, hidden)
    return moments


def _keep(kept: list[Tensor], x: Tensor) -> None:
    kept.append(x.clone())  # layers compute in place


@contextmanager
def _watched(
    linears: Sequence[TappedLinear], watchers: Sequence[Callable[[Tensor], None]]
) -> Iterator[None]:
    for linear, watcher in zip(linears, watchers, strict=True):
        linear.watch = watcher
    try:
        yield
    finally:
        for linear in linears:
            linear.watch = None


def parts_of(linear: TappedLinear) -> list[tuple[str, Tensor]]:
    """(name, weight [out, in] fp32) of each checkpoint tensor of a layer."""
    return [
        (name, weight.float()) for name, weight in zip(linear.names, linear.weights, strict=True)
    ]
