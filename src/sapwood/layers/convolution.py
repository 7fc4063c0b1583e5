"""Layers over pictures [B, channels, height, width]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.targets import Target, whole


class Conv2d:
    """A convolution, by torch: oneDNN's on CPUs, cuDNN's on GPUs."""

    def __init__(
        self,
        build: Build,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        *,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        """padding: on each side; None: as much as keeps the size"""
        self._weight = build.empty(out_channels, in_channels, kernel, kernel)
        self._bias = build.empty(out_channels) if bias else None
        self._stride = stride
        self._padding = kernel // 2 if padding is None else padding

    def __call__(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self._weight, self._bias, self._stride, self._padding)

    def targets(self) -> dict[str, Target]:
        found = {"weight": whole(self._weight)}
        return found if self._bias is None else found | {"bias": whole(self._bias)}


class GroupNorm:
    """Normalises groups of channels over the whole picture. Source: Wu and He 2018,
    arXiv:1803.08494."""

    def __init__(self, build: Build, num_groups: int, channels: int, *, eps: float) -> None:
        self._num_groups = num_groups
        self._weight = build.empty(channels)
        self._bias = build.empty(channels)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        return F.group_norm(x, self._num_groups, self._weight, self._bias, self._eps)

    def silu(self, x: Tensor) -> Tensor:
        """silu(norm(x))"""
        return F.silu(self(x), inplace=True)

    def targets(self) -> dict[str, Target]:
        return {"weight": whole(self._weight), "bias": whole(self._bias)}
