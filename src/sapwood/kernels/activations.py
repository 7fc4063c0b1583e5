"""The activations of feed-forward layers.

Sources: GELU, Hendrycks and Gimpel 2016, arXiv:1606.08415; SiLU, Elfwing et al. 2017,
arXiv:1702.03118."""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from torch import Tensor


class Activation(StrEnum):
    """GELU_TANH is GELU with its integral approximated by tanh."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


def activate(x: Tensor, activation: Activation) -> Tensor:
    """The activation of each entry of x, of x's dtype."""
    match activation:
        case Activation.SILU:
            return F.silu(x)
        case Activation.GELU:
            return F.gelu(x)
        case Activation.GELU_TANH:
            return F.gelu(x, approximate="tanh")
        case Activation.RELU:
            return torch.relu(x)


def activate_and_mul(x: Tensor, activation: Activation) -> Tensor:
    """x [T, 2 * I] -> activation(x[:, :I]) * x[:, I:]"""
    gate, up = x.chunk(2, dim=-1)
    return activate(gate, activation) * up
