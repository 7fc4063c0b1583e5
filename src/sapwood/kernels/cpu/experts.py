"""A mixture of experts in one call into C++ (csrc/experts.h)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeGuard

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.linear import Linear
from sapwood.kernels.cpu.quantized import QuantizedLinear
from sapwood.kernels.cpu.tensors import ACTIVATIONS, DTYPES
from sapwood.kernels.packed import PackedExperts, PackedLinear
from sapwood.kernels.routing import Routing, Scores
from sapwood.kernels.torch_ops import experts as torch_experts

SCORES = {scores: number for number, scores in enumerate(Scores)}
"""As Scores in csrc/experts.h numbers them."""
RoutingTuple = tuple[int, int, int, int, int, bool, float, float, float]


def routing_tuple(routing: Routing) -> RoutingTuple:
    """A rule as the compiled module takes it."""
    return (
        SCORES[routing.scores], routing.num_chosen, routing.num_groups, routing.num_groups_chosen,
        routing.group_best, routing.renormalise, routing.least_sum, routing.scale, routing.jitter,
    )  # fmt: skip


def route(logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
    """As Kernels.route."""
    num_tokens, num_experts = logits.shape
    routing.check(num_experts)
    logits = logits.float().contiguous()
    weights = torch.empty(num_tokens, routing.num_chosen)
    ids = torch.empty(num_tokens, routing.num_chosen, dtype=torch.int64)
    _native.route(
        routing_tuple(routing), logits.data_ptr(), bias_address(bias, num_experts), num_tokens,
        num_experts, weights.data_ptr(), ids.data_ptr(),
    )  # fmt: skip
    return weights, ids


def bias_address(bias: Tensor | None, num_experts: int) -> int:
    """The address of a correction bias, which the caller keeps alive; 0 for None."""
    if bias is None:
        return 0
    if bias.dtype != torch.float32 or bias.shape != (num_experts,) or not bias.is_contiguous():
        raise ValueError(f"a correction bias must be [{num_experts}] of fp32 and contiguous")
    return bias.data_ptr()


class NativeExperts:
    """As PackedExperts. `native` is what a recorded step takes.

    shapes  (inputs, outputs) of each expert's first and last layer
    mixture  has the buffers, which all layers of a model share
    """

    can_be_captured = False

    def __init__(
        self,
        context: _native.Context,
        mixture: _native.Mixture,
        gate_up: Sequence[Linear | QuantizedLinear],
        down: Sequence[Linear | QuantizedLinear],
        activation: Activation,
        limit: float | None,
    ) -> None:
        self._context = context
        self._mixture = mixture
        self._layers = (tuple(gate_up), tuple(down))  # the compiled module has their addresses only
        self.num_experts = len(gate_up)
        self.hidden_size = gate_up[0].sizes[1]
        self.shapes = tuple((side[0].sizes[1], side[0].sizes[0]) for side in (gate_up, down))
        self.dtype = gate_up[0].dtype
        gates, outputs = ([layer.native_weight for layer in side] for side in self._layers)
        self.native = _native.ExpertLayers(gates, outputs, ACTIVATIONS[activation], limit or 0.0)

    def __call__(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        num_tokens, num_chosen = chosen.shape
        if x.shape != (num_tokens, self.hidden_size) or x.dtype != self.dtype:
            raise ValueError(
                f"x {list(x.shape)} {x.dtype} does not fit {num_tokens} choices among experts of "
                f"{self.hidden_size} inputs for {self.dtype}"
            )
        if chosen.numel():
            torch_experts.check_chosen(int(chosen.max()), self.num_experts)
        x, chosen, weights = x.contiguous(), chosen.contiguous(), weights.float().contiguous()
        if weights.shape != chosen.shape or chosen.dtype != torch.int64:
            raise ValueError("each of a token's experts, which are int64, needs a weight")
        out = torch.empty_like(x)
        self._mixture.run(
            self.native, self._context, DTYPES[self.dtype], x.data_ptr(), num_tokens, num_chosen,
            chosen.data_ptr(), weights.data_ptr(), out.data_ptr(),
        )  # fmt: skip
        return out


def pack_experts(
    context: _native.Context,
    mixture: _native.Mixture,
    gate_up: Sequence[PackedLinear],
    down: Sequence[PackedLinear],
    activation: Activation,
    limit: float | None,
    activate: Callable[[Tensor], Tensor],
    *,
    gated: bool,
) -> PackedExperts:
    """As Kernels.pack_experts; `activate` as torch_ops.experts.activation_of makes it. Layers
    without a native form are computed one by one."""
    torch_experts.check_experts(len(gate_up), len(down))
    native_gates = [layer for layer in gate_up if _is_native(layer)]
    native_outputs = [layer for layer in down if _is_native(layer)]
    if not gate_up or len(native_gates) + len(native_outputs) < 2 * len(gate_up):
        return torch_experts.Experts(gate_up, down, activate)
    first, last = native_gates[0], native_outputs[0]
    for gate, out in zip(native_gates, native_outputs, strict=True):
        shapes = (gate.sizes, out.sizes, gate.dtype, out.dtype)
        if shapes != (first.sizes, last.sizes, first.dtype, first.dtype):
            raise ValueError("experts of a mixture must have equal sizes and one dtype")
    (num_gates, hidden_size), (num_out, num_in) = first.sizes, last.sizes
    if num_gates != (2 if gated else 1) * num_in or num_out != hidden_size:
        raise ValueError(
            f"gates [{num_gates}, {hidden_size}] do not fit outputs [{num_out}, {num_in}]"
        )
    return NativeExperts(context, mixture, native_gates, native_outputs, activation, limit)


def _is_native(layer: PackedLinear) -> TypeGuard[Linear | QuantizedLinear]:
    """Whether C++ takes rows of x for this layer as they are: bf16 needs an even number."""
    if not isinstance(layer, Linear | QuantizedLinear):
        return False
    return layer.native_weight.k == layer.sizes[1]
