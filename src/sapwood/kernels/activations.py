"""The activations of feed-forward layers."""

from __future__ import annotations

from enum import StrEnum


class Activation(StrEnum):
    """What `Kernels.activate` computes of each entry x, in fp32.

    SILU        x / (1 + e^-x) (Elfwing et al. 2017, arXiv:1702.03118)
    GELU        x times the share of a normal distribution below x, exactly (Hendrycks and Gimpel
                2016, arXiv:1606.08415)
    GELU_TANH   the same, approximated by tanh (same source)
    RELU        the larger one of x and 0
    RELU2       its square (So et al. 2021, arXiv:2109.08668)
    QUICK_GELU  x / (1 + e^(-1.702 x)), another approximation of GELU (same source as GELU)
    """

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"
    QUICK_GELU = "quick_gelu"
