"""The router of a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.low_rank import LowRankLayer
from sapwood.kernels.packed import PackedExperts
from sapwood.kernels.recording import Mix, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.routing import Routing
from sapwood.layers.build import Build
from sapwood.layers.linear import Linear
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.targets import Target, whole


class Router:
    """Chooses the experts of each token by the fp32 result of a linear layer."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        num_experts: int,
        routing: Routing,
        *,
        name: str,
        bias: bool = False,
        correction: str | None = None,
        correction_is_row: bool = False,
    ) -> None:
        """A router without weights. Raises ConfigError if the rule does not fit the experts.

        name        of the linear layer in the checkpoint
        bias        whether that layer has a bias
        correction  name of the correction bias in the checkpoint; None: there is none
        correction_is_row  whether it is [1, num_experts] there, instead of [num_experts]
        """
        try:
            routing.check(num_experts)
        except ValueError as error:
            raise ConfigError(f"the model's routing to experts is impossible: {error}") from None
        self._kernels = build.kernels
        self._routes = build.routes
        self._shape = (num_experts, hidden_size)
        self._routing = routing
        self._name = name
        # The router chooses: what rounding its weights would save is small, and what it would
        # change is not.
        dense = replace(build, scheme=DENSE)
        self._linear = Linear(dense, hidden_size, (num_experts,), bias=bias)
        self._correction_name = correction
        self._correction_is_row = correction_is_row
        self._correction = (
            None
            if correction is None
            else torch.empty(num_experts, dtype=torch.float32, device=build.device)
        )

    @property
    def num_chosen(self) -> int:
        """Experts of each token."""
        return self._routing.num_chosen

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, hidden] -> (weights [T, k] fp32, experts [T, k])"""
        scores = self._linear.packed.fp32(x)
        weights, experts = self._kernels.route(scores, self._correction, self._routing)
        if self._routes is not None:
            self._routes.add(experts)
        return weights, experts

    def targets(self) -> dict[str, Target]:
        found = {f"{self._name}.weight": Target(self._shape, self._put)}
        if self._linear.bias is not None:
            found[f"{self._name}.bias"] = whole(self._linear.bias)
        if self._correction is not None and self._correction_name is not None:
            own = self._correction[None] if self._correction_is_row else self._correction
            found[self._correction_name] = whole(own)
        return found

    def _put(self, weight: Tensor) -> None:
        self._linear.put(0, weight)

    def pack(self) -> None:
        self._linear.pack()

    def record(
        self,
        program: Program,
        x: Buffer,
        experts: PackedExperts,
        taken: Buffer | None = None,
        additions: tuple[Sequence[LowRankLayer], Sequence[LowRankLayer]] | None = None,
        *,
        num_identity: int = 0,
    ) -> Buffer:
        """Add the router of x and its experts, which take x or `taken`, to a recorded step;
        `additions` and `num_identity` as in Mix."""
        taken = taken or x
        out = program.buffer(taken.width)
        program.add(
            Mix(
                x=x,
                taken=taken,
                router=self._linear.packed,
                num_experts=self._shape[0],
                bias=self._correction,
                routing=self._routing,
                experts=experts,
                out=out,
                additions=additions,
                num_identity=num_identity,
            )
        )
        return out
