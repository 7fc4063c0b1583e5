"""Linear layers of every format, adapters' additions to them, and mixtures of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.low_rank import LowRankLayer
from sapwood.kernels.packed import PackedExperts, PackedLinear
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.routing import Routing


class ProductOps(Protocol):
    """See `Kernels` (kernels/interface.py) for what the letters of the shapes stand for."""

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        """The experts of each token by a router's rule, in fp32, and their weights.

        logits   [T, num_experts] of a float dtype
        bias     the correction bias [num_experts] fp32, or None
        Returns  (weights [T, k] fp32, experts [T, k] int64), in the order of the choice
        Raises   ValueError if the rule does not fit the number of experts"""
        ...

    def pack_experts(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activation: Activation,
        limit: float | None = None,
        *,
        gated: bool = True,
    ) -> PackedExperts:
        """The experts of a mixture, of linear layers that these kernels have packed.

        gate_up  of each expert: hidden -> 2 * I, the gate's outputs first, or if not `gated`, I; in
                 any format
        down     of each expert: I -> hidden
        limit    before the activation the gate becomes at most that, and up becomes 1 + what is
                 left of it between -limit and limit (OpenAI 2025, arXiv:2508.10925); None: they
                 stay as they are
        Raises   ValueError if there are not as many of one as of the other"""
        ...

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """weight [out, in], bias [out] of `dtype` or None -> the layer, packed once.

        dtype  of the x that it is called with, by default the weight's own. With a narrower weight
               the products are those of the weight in `dtype`"""
        ...

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Quantised weights -> the layer, packed once; called with x of `dtype`.

        parts  each [its outputs, in], of any kinds; the layer's outputs are theirs in this order
        bias   [all outputs] of `dtype`, or None

        kernels/quantized.py and kernels/coded.py state the formats and what the products are."""
        ...

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        """Adapters' additions to a linear layer of these sizes, none at first."""
        ...

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        """weight [out, in] of a float dtype -> "int8", "q8_0" or "q4_1"; see
        kernels/quantized.py. (kernels/coded.py quantises to codes, the same for all kernels.)

        Raises ValueError for another kind, or if the inputs do not fit it."""
        ...
