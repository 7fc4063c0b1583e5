"""A feed-forward layer of experts, of which each token uses a few.

Source: Shazeer et al. 2017, arXiv:1701.06538."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import PackedLinear
from sapwood.kernels.recording import Buffer, CannotRecord, Program
from sapwood.layers.build import Build
from sapwood.layers.linear import (
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    divide,
    even_part,
)
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.targets import Target, prefixed, unused


class Experts:
    """The sum of down(activation(gate(x)) * up(x)) of the experts that the router chooses."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        num_per_token: int,
        renormalise: bool,
        activation: Activation,
        router: str,
        names: tuple[str, str, str],
    ) -> None:
        """A layer without weights.

        intermediate_size  of each expert
        renormalise        whether the weights of a token's experts are divided by their sum
        router             name of the router in the checkpoint
        names              of gate, up and down in experts.<number>
        """
        self._kernels = build.kernels
        self._hidden_size = hidden_size
        self._num_per_token = num_per_token
        self._renormalise = renormalise
        self._activation = activation
        self._router_name = router
        self._num_experts = num_experts
        # The router chooses: what rounding its weights would save is small, and what it would
        # change is not.
        self._router = Linear(replace(build, scheme=DENSE), hidden_size, (num_experts,), bias=False)
        groups = build.groups
        # Experts that are spread over ranks are whole.
        within = groups.tp if groups.ep.size == 1 else Group()
        self._over = groups.tp if groups.ep.size == 1 else groups.ep
        num_own = divide(num_experts, groups.ep, f"{num_experts} experts")
        self._first = groups.ep.rank * num_own
        gate, up, down = names
        parts = (
            even_part(gate, intermediate_size, within),
            even_part(up, intermediate_size, within),
        )
        self._gate_up = [
            ColumnParallelLinear(build, hidden_size, parts, bias=False) for _ in range(num_own)
        ]
        self._down = [
            RowParallelLinear(build, down, intermediate_size, hidden_size, bias=False, group=within)
            for _ in range(num_own)
        ]
        self._packed: tuple[list[PackedLinear], list[PackedLinear]] = ([], [])

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        weights, chosen = self._kernels.top_k_softmax(
            self._router.packed.fp32(x), self._num_per_token, renormalise=self._renormalise
        )
        if len(self._gate_up) < self._num_experts:
            chosen = chosen - self._first
            elsewhere = (chosen < 0) | (chosen >= len(self._gate_up))
            weights = weights.masked_fill(elsewhere, 0.0)
            chosen = chosen.masked_fill(elsewhere, 0)
        gate_up, down = self._packed
        out = self._kernels.experts(x, chosen, weights, gate_up, down, self._activation)
        return self._over.all_reduce(out)

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]:
        """As FeedForward.steps, which there are none of here."""
        raise ConfigError("an expert sees only some tokens, so that its inputs cannot be tapped")
        yield x  # which makes this a generator

    def targets(self) -> dict[str, Target]:
        shape = (self._num_experts, self._hidden_size)
        found = {f"{self._router_name}.weight": Target(shape, self._put_router)}
        for index in range(self._num_experts):
            own = index - self._first
            is_own = 0 <= own < len(self._gate_up)
            at = own if is_own else 0
            targets = self._gate_up[at].targets() | self._down[at].targets()
            if not is_own:
                targets = {name: unused(target.shape) for name, target in targets.items()}
            found |= prefixed(f"experts.{index}", targets)
        return found

    def _put_router(self, weight: Tensor) -> None:
        self._router.put(0, weight)

    def pack(self) -> None:
        self._router.pack()
        for up, down in zip(self._gate_up, self._down, strict=True):
            up.linear.pack()
            down.linear.pack()
        self._packed = (
            [layer.linear.packed for layer in self._gate_up],
            [layer.linear.packed for layer in self._down],
        )

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As FeedForward.record."""
        raise CannotRecord("experts are computed op by op")
