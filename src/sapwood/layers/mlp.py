"""Feed-forward layers: gated (Shazeer 2020, arXiv:2002.05202) and plain."""

from __future__ import annotations

from collections.abc import Generator

from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.recording import Activate, Buffer, Program
from sapwood.layers.build import Build
from sapwood.layers.linear import ColumnParallelLinear, RowParallelLinear, even_part
from sapwood.layers.targets import Target


class _MLP:
    """down(expand(up(x))), where `up` are one or two layers as one matrix product."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        up: tuple[str, ...],
        down: str,
        activation: Activation,
        bias: bool,
    ) -> None:
        """`up` and `down`: names of the linear layers in the checkpoint."""
        group = build.groups.tp
        self._kernels = build.kernels
        self._activation = activation
        self._is_gated = len(up) == 2
        parts = tuple(even_part(name, intermediate_size, group) for name in up)
        self._up = ColumnParallelLinear(build, hidden_size, parts, bias=bias)
        self._down = RowParallelLinear(
            build, down, intermediate_size, hidden_size, bias=bias, group=group
        )

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
        compute = self._kernels.activate_and_mul if self._is_gated else self._kernels.activate
        return compute(self._up(x), self._activation)

    def targets(self) -> dict[str, Target]:
        return self._up.targets() | self._down.targets()

    def pack(self) -> None:
        self._up.linear.pack()
        self._down.linear.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        up = self._up.record(program, x)
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
    ) -> None:
        gate, up, down = names
        super().__init__(
            build,
            hidden_size,
            intermediate_size,
            up=(gate, up),
            down=down,
            activation=activation,
            bias=bias,
        )


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
        )
