"""The residual block of autoencoders and U-Nets, and the layers that change a picture's size.

Source: He et al. 2015, arXiv:1512.03385; Rombach et al. 2021, arXiv:2112.10752."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.convolution import Conv2d, GroupNorm
from sapwood.layers.named_linear import linear
from sapwood.layers.targets import Target, prefixed


class ResidualBlock:
    """x + conv(silu(norm(conv(silu(norm(x))) + time)))."""

    def __init__(
        self,
        build: Build,
        in_channels: int,
        out_channels: int,
        *,
        num_groups: int = 32,
        eps: float = 1e-6,
        time_size: int | None = None,
    ) -> None:
        """time_size: of the vector of the timestep; None: the block is given none"""
        self._norm1 = GroupNorm(build, num_groups, in_channels, eps=eps)
        self._conv1 = Conv2d(build, in_channels, out_channels)
        self._time = None
        if time_size is not None:
            self._time = linear(build, "time_emb_proj", time_size, out_channels)
        self._norm2 = GroupNorm(build, num_groups, out_channels, eps=eps)
        self._conv2 = Conv2d(build, out_channels, out_channels)
        self._shortcut = None
        if in_channels != out_channels:
            self._shortcut = Conv2d(build, in_channels, out_channels, 1)

    def __call__(self, x: Tensor, time: Tensor | None = None) -> Tensor:
        """x [B, in, H, W]; time [B, time_size], after its activation -> [B, out, H, W]"""
        inner = self._conv1(self._norm1.silu(x))
        if self._time is not None:
            assert time is not None
            inner = inner + self._time(time)[:, :, None, None]
        inner = self._conv2(self._norm2.silu(inner))
        return inner.add_(x if self._shortcut is None else self._shortcut(x))

    def targets(self) -> dict[str, Target]:
        found = {
            **prefixed("norm1", self._norm1.targets()),
            **prefixed("conv1", self._conv1.targets()),
            **prefixed("norm2", self._norm2.targets()),
            **prefixed("conv2", self._conv2.targets()),
        }
        if self._time is not None:
            found |= self._time.targets()
        if self._shortcut is not None:
            found |= prefixed("conv_shortcut", self._shortcut.targets())
        return found


class Upsample:
    """Every pixel becomes four, or as many as `size` asks for; then a convolution."""

    def __init__(self, build: Build, channels: int) -> None:
        self._conv = Conv2d(build, channels, channels)

    def __call__(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        if size is None:
            x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        else:
            x = F.interpolate(x, size=size, mode="nearest")
        return self._conv(x)

    def targets(self) -> dict[str, Target]:
        return prefixed("conv", self._conv.targets())


class Downsample:
    """A convolution of every other pixel; an autoencoder pads at the right and the bottom alone."""

    def __init__(self, build: Build, channels: int, *, pads_all_sides: bool) -> None:
        self._pads_all_sides = pads_all_sides
        padding = 1 if pads_all_sides else 0
        self._conv = Conv2d(build, channels, channels, stride=2, padding=padding)

    def __call__(self, x: Tensor) -> Tensor:
        return self._conv(x if self._pads_all_sides else F.pad(x, (0, 1, 0, 1)))

    def targets(self) -> dict[str, Target]:
        return prefixed("conv", self._conv.targets())
