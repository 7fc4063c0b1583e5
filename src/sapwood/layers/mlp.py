"""Feed-forward layers: gated (Shazeer 2020, arXiv:2002.05202) and plain."""

from __future__ import annotations

from collections.abc import Generator
from copy import copy
from statistics import NormalDist
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import Activate, CannotRecord, Program, ScaleColumns, Xielu
from sapwood.kernels.recording_buffers import Buffer
from sapwood.layers.build import Build
from sapwood.layers.linear import (
    Addition,
    Arrangement,
    ColumnParallelLinear,
    RowParallelLinear,
    even_part,
)
from sapwood.layers.targets import Target, prefixed, whole


class _MLP:
    """down(expand(up(x))), where `up` are one or two layers as one matrix product."""

    sends_rows = False

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        up: tuple[str, ...],
        down: str,
        activation: Activation | None,
        bias: bool,
        fused: str | None = None,
        transposed: bool = False,
        gate_factor: float = 1.0,
    ) -> None:
        """A feed-forward layer.

        up, down    names of the linear layers in the checkpoint
        activation  of `expand`; None: a subclass has another one
        fused       name of the one layer that holds all of `up`, in this order; None: each is one
        transposed  whether the checkpoint's weights are [in, out]
        gate_factor  of what the first of two `up` gives
        """
        group = build.groups.tp
        self._kernels = build.kernels
        self._activation = activation
        self._is_gated = len(up) == 2
        self._addition: Addition | None = None
        parts = tuple(even_part(name, intermediate_size, group) for name in up)
        arrangement = None
        if fused is not None or transposed:
            arrangement = Arrangement.in_sequence(parts, fused=fused, transposed=transposed)
        self._up = ColumnParallelLinear(
            build, hidden_size, parts, bias=bias, arrangement=arrangement
        )
        self._down = RowParallelLinear(
            build,
            down,
            intermediate_size,
            hidden_size,
            bias=bias,
            group=group,
            transposed=transposed,
        )
        self._gate_factors: Tensor | None = None
        if gate_factor != 1.0:
            self._gate_factors = build.empty(parts[0].size).fill_(gate_factor)

    def with_addition(self, addition: Addition) -> Self:
        """The same weights; `addition` adds to what `up` gives. Load and pack the original only."""
        other = copy(self)
        other._addition = addition
        return other

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        return self._down(self._expand(x))

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]:
        """As FeedForward.steps."""
        yield x
        expanded = self._expand(x)
        yield expanded
        return self._down(expanded)

    def _expand(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, this rank's intermediate]"""
        assert self._activation is not None
        compute = self._kernels.activate_and_mul if self._is_gated else self._kernels.activate
        up = self._product(x)
        if self._gate_factors is not None:
            up[:, : len(self._gate_factors)].mul_(self._gate_factors)
        return compute(up, self._activation)

    def _product(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> what `up` gives"""
        up = self._up(x)
        if self._addition is not None:
            self._addition(x, up)
        return up

    def _recorded_product(self, program: Program, x: Buffer) -> Buffer:
        up = self._up.record(program, x)
        if self._addition is not None:
            self._addition.record(program, x, up)
        return up

    def targets(self) -> dict[str, Target]:
        return self._up.targets() | self._down.targets()

    def pack(self) -> None:
        self._up.linear.pack()
        self._down.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        assert self._activation is not None
        up = self._recorded_product(program, x)
        if self._gate_factors is not None:
            program.add(ScaleColumns(residual=up, first=0, factors=self._gate_factors))
        expanded = program.buffer(up.width // 2 if self._is_gated else up.width)
        program.add(Activate(x=up, activation=self._activation, gated=self._is_gated, out=expanded))
        return self._down.record(program, expanded)


class GatedMLP(_MLP):
    """down(activation(gate(x)) * up(x))."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation = Activation.SILU,
        bias: bool = False,
        names: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
        fused: str | None = None,
        gate_factor: float = 1.0,
    ) -> None:
        """`fused`: name of the one layer that holds gate and then up; None: there are two.
        gate_factor: of what the gate's layer gives"""
        gate, up, down = names
        super().__init__(
            build,
            hidden_size,
            intermediate_size,
            up=(gate, up),
            down=down,
            activation=activation,
            bias=bias,
            fused=fused,
            gate_factor=gate_factor,
        )


class SparseGatedMLP(GatedMLP):
    """A gated layer that keeps the largest entries of gate(x), less the bound that they exceed: all
    but `sparsity` of them, if they are normally distributed. The others count as 0.

    Source: Gemma 3n's model code, Google 2025."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        sparsity: float,
        activation: Activation,
    ) -> None:
        """sparsity: from 0 to 1, exclusive"""
        super().__init__(build, hidden_size, intermediate_size, activation=activation)
        self._group = build.groups.tp
        self._deviations = NormalDist().inv_cdf(sparsity)

    def _expand(self, x: Tensor) -> Tensor:
        assert self._activation is not None
        gate, up = self._product(x).chunk(2, dim=-1)
        deviation, mean = self._deviation_and_mean(gate)
        kept = F.relu(gate - (mean + deviation * self._deviations))
        return self._kernels.activate_and_mul(torch.cat((kept, up), dim=-1), self._activation)

    def _deviation_and_mean(self, gate: Tensor) -> tuple[Tensor, Tensor]:
        """gate [T, this rank's entries] -> [T, 1] each, over the entries of all ranks"""
        if self._group.size == 1:
            return torch.std_mean(gate, dim=-1, keepdim=True, correction=0)
        own = torch.cat(torch.var_mean(gate.float(), dim=-1, keepdim=True, correction=0), dim=-1)
        # Equally many entries are on each rank.
        variances, means = self._group.all_gather(own).view(len(gate), -1, 2).unbind(dim=-1)
        between, mean = torch.var_mean(means, dim=-1, keepdim=True, correction=0)
        deviation = (variances.mean(dim=-1, keepdim=True) + between).sqrt()
        return deviation.to(gate.dtype), mean.to(gate.dtype)

    def record(self, program: Program, x: Buffer) -> Buffer:
        raise CannotRecord("a recorded step has no sparse gates")


class PlainMLP(_MLP):
    """down(activation(up(x)))."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        activation: Activation,
        bias: bool,
        names: tuple[str, str],
        transposed: bool = False,
    ) -> None:
        up, down = names
        super().__init__(
            build,
            hidden_size,
            intermediate_size,
            up=(up,),
            down=down,
            activation=activation,
            bias=bias,
            transposed=transposed,
        )


class XieluMLP(_MLP):
    """down(xielu(up(x))), where a and b are learned numbers of the layer: xielu(x) is a x² + x / 2
    above 0, and b (e^x - 1 - x) + x / 2 elsewhere. Source: Huang and Schlag 2024,
    arXiv:2411.13010."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        learned: tuple[float, float] | None = None,
    ) -> None:
        """learned: the numbers for x above 0 and elsewhere, of which a and b are made; None: the
        checkpoint has tensors of them"""
        super().__init__(
            build,
            hidden_size,
            intermediate_size,
            up=("up_proj",),
            down="down_proj",
            activation=None,
            bias=False,
        )
        self._positive, self._negative = build.empty(1), build.empty(1)
        self._is_known = learned is not None
        if learned is not None:
            self._positive.fill_(learned[0])
            self._negative.fill_(learned[1])
        self._factors = (0.0, 0.0)

    def _expand(self, x: Tensor) -> Tensor:
        return self._kernels.xielu(self._product(x), *self._factors)

    def targets(self) -> dict[str, Target]:
        if self._is_known:
            return super().targets()
        learned = {"alpha_p": whole(self._positive), "alpha_n": whole(self._negative)}
        return super().targets() | prefixed("act_fn", learned)

    def pack(self) -> None:
        super().pack()
        above, below = (F.softplus(x.float()).item() for x in (self._positive, self._negative))
        self._factors = (above, 0.5 + below)

    def record(self, program: Program, x: Buffer) -> Buffer:
        up = self._recorded_product(program, x)
        expanded = program.buffer(up.width)
        above, below = self._factors
        program.add(Xielu(x=up, above=above, below=below, out=expanded))
        return self._down.record(program, expanded)
