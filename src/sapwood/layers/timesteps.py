"""Timesteps as vectors. Source: Ho et al. 2020, arXiv:2006.11239; Vaswani et al. 2017,
arXiv:1706.03762."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.layers.build import Build
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target


def sinusoids(
    numbers: Tensor,
    size: int,
    *,
    cosines_first: bool = True,
    frequency_shift: float = 0.0,
    max_period: float = 10_000.0,
) -> Tensor:
    """numbers [R] -> [R, size] fp32: their cosines and sines at size / 2 frequencies

    frequency_shift  taken from the number of frequencies where the last one is computed: 1 has
                     1 / max_period as the last frequency, 0 comes short of it
    """
    half = size // 2
    steps = torch.arange(half, dtype=torch.float32, device=numbers.device)
    frequencies = torch.exp(-math.log(max_period) * steps / (half - frequency_shift))
    angles = numbers[:, None].float() * frequencies
    parts = (angles.cos(), angles.sin()) if cosines_first else (angles.sin(), angles.cos())
    return torch.cat(parts, dim=-1)


class EmbeddingMLP:
    """second(activation(first(x))): what makes a conditioning vector of numbers or of text."""

    def __init__(
        self,
        build: Build,
        in_size: int,
        hidden_size: int,
        *,
        out_size: int | None = None,
        names: tuple[str, str] = ("linear_1", "linear_2"),
        bias: bool = True,
    ) -> None:
        first, second = names
        self._first = linear(build, first, in_size, hidden_size, bias=bias)
        self._second = linear(build, second, hidden_size, out_size or hidden_size, bias=bias)
        self._kernels = build.kernels

    def __call__(self, x: Tensor) -> Tensor:
        """x [R, in] -> [R, out]"""
        return self._second(self._kernels.activate(self._first(x), Activation.SILU))

    def targets(self) -> dict[str, Target]:
        return self._first.targets() | self._second.targets()


class TimestepEmbedder:
    """An EmbeddingMLP of a number's sinusoids."""

    def __init__(
        self, build: Build, size: int, *, frequencies: int = 256, bias: bool = True
    ) -> None:
        self._frequencies = frequencies
        self._dtype = build.dtype
        self._mlp = EmbeddingMLP(build, frequencies, size, bias=bias)

    def __call__(self, numbers: Tensor) -> Tensor:
        """numbers [R] fp32 -> [R, size]"""
        return self._mlp(sinusoids(numbers, self._frequencies).to(self._dtype))

    def targets(self) -> dict[str, Target]:
        return self._mlp.targets()
