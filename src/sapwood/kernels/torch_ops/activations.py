"""Activations with torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation


def activate(x: Tensor, activation: Activation) -> Tensor:
    """As Kernels.activate."""
    match activation:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return F.relu(x)
        case Activation.RELU2:
            return F.relu(x).square_()
        case Activation.QUICK_GELU:
            wide = x.float()
            return (wide * torch.sigmoid(1.702 * wide)).to(x.dtype)


_XIELU_BELOW = -1e-6
"""The largest x that e^x is taken of in xIELU."""


def xielu(x: Tensor, above: float, below: float) -> Tensor:
    """As Kernels.xielu."""
    wide = x.float()
    curve = torch.where(
        wide > 0,
        above * wide * wide,
        (torch.expm1(wide.clamp(max=_XIELU_BELOW)) - wide) * below,
    )
    return (curve + 0.5 * wide).to(x.dtype)


def activate_and_mul(x: Tensor, activation: Activation) -> Tensor:
    """As Kernels.activate_and_mul."""
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation).mul_(up)
