"""Norms and gates whose numbers come from a row's conditioning vector: its timestep, its prompt.

Source: Peebles and Xie 2022, arXiv:2212.09748 (adaLN-Zero)."""

from __future__ import annotations

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import Kernels
from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target
from sapwood.layers.token_rows import TokenRows, packed


class Modulation:
    """A linear layer that makes `count` vectors of each row's conditioning vector."""

    def __init__(
        self,
        build: Build,
        name: str,
        in_size: int,
        size: int,
        count: int,
        *,
        bias: bool = True,
        activates: bool = True,
    ) -> None:
        """activates: whether the vector goes through SiLU before"""
        self._linear = linear(build, name, in_size, count * size, bias=bias)
        self._count = count
        self._kernels = build.kernels
        self._activates = activates

    def __call__(self, condition: Tensor) -> tuple[Tensor, ...]:
        """condition [R, in] -> `count` times [R, size]"""
        if self._activates:
            condition = self._kernels.activate(condition, Activation.SILU)
        return self._linear(condition).chunk(self._count, dim=-1)

    def targets(self) -> dict[str, Target]:
        return self._linear.targets()


def modulated_norm(
    kernels: Kernels, x: Tensor, rows: TokenRows, *, shift: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """(1 + scale) * normalised(x) + shift, as one pass over x: each row's numbers are the weight
    and the bias of its LayerNorm.

    x [T, size]; shift, scale [R, size] -> [T, size]"""
    weight = scale + 1.0
    return packed(
        [
            kernels.layer_norm(own, weight[row], shift[row], eps)
            for row, own in enumerate(rows.split(x))
            if len(own) or len(rows.lengths) == 1
        ]
    )


def scaled_norm(
    kernels: Kernels, x: Tensor, rows: TokenRows, *, weight: Tensor, scale: Tensor, eps: float
) -> Tensor:
    """(1 + scale) * RMSNorm(x) with that weight. x [T, size]; weight [size]; scale [R, size]"""
    weights = (scale + 1.0) * weight
    return packed(
        [
            kernels.rms_norm(own, weights[row], eps)
            for row, own in enumerate(rows.split(x))
            if len(own) or len(rows.lengths) == 1
        ]
    )


def add_gated(x: Tensor, gate: Tensor, addition: Tensor, rows: TokenRows) -> None:
    """x += gate * addition. x, addition [T, size]; gate [R, size]"""
    for row, span in enumerate(rows.spans):
        x[span].addcmul_(gate[row], addition[span])
