"""A feed-forward layer of experts, of which each token uses a few.

Source: Shazeer et al. 2017, arXiv:1701.06538; shared experts: Dai et al. 2024, arXiv:2401.06066."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.activations import Activation
from sapwood.kernels.interface import PackedExperts
from sapwood.kernels.recording import Add, Buffer, GateRows, Multiply, Program
from sapwood.layers.build import Build
from sapwood.layers.layer import FeedForward
from sapwood.layers.linear import (
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    divide,
    even_part,
)
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.router import Router
from sapwood.layers.targets import Target, prefixed, unused

GATE, UP, DOWN = "gate", "up", "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerExpert:
    """A checkpoint with tensors for each expert: experts.<number>.<name>.weight, and with `bias`
    likewise a bias."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A checkpoint with one tensor for the first layers of all experts, and one for their outputs.

    gate_up      [experts, 2 * inner, hidden]: all of the gate's rows, then the others
    down         [experts, hidden, inner]
    transposed   the last two dimensions are the other way round
    interleaved  rows of the gate and the others take turns
    biases       names of the biases [experts, outputs] of both; None: there are none
    """

    gate_up: str
    down: str
    transposed: bool = False
    interleaved: bool = False
    biases: tuple[str, str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Shared:
    """An expert that every token has, besides those that the router chooses.

    name  in the checkpoint
    gate  name of a linear layer with one output, whose logistic function is the expert's weight;
          None: the weight is 1
    """

    name: str
    body: FeedForward
    gate: str | None = None


class Experts:
    """The sum of down(activation(gate(x)) * up(x)) of the experts that the router chooses."""

    def __init__(
        self,
        build: Build,
        hidden_size: int,
        intermediate_size: int,
        *,
        num_experts: int,
        router: Router,
        activation: Activation,
        files: PerExpert | Fused,
        limit: float | None = None,
        shared: Shared | None = None,
    ) -> None:
        """A layer without weights.

        intermediate_size  of each expert
        files              how the checkpoint has the experts' weights
        limit              as in Kernels.pack_experts
        """
        self._kernels = build.kernels
        self._sizes = (hidden_size, intermediate_size)
        self._activation = activation
        self._limit = limit
        self._router = router
        self._num_experts = num_experts
        self._files = files
        groups = build.groups
        # Experts that are spread over ranks are whole.
        within = groups.tp if groups.ep.size == 1 else Group()
        self._over = groups.tp if groups.ep.size == 1 else groups.ep
        num_own = divide(num_experts, groups.ep, f"{num_experts} experts")
        self._first = groups.ep.rank * num_own
        parts = tuple(even_part(name, intermediate_size, within) for name in (GATE, UP))
        bias = files.bias if isinstance(files, PerExpert) else files.biases is not None
        build = replace(build, adapters=None)  # their products are one op, which has no adapters
        self._gate_up = [
            ColumnParallelLinear(build, hidden_size, parts, bias=bias) for _ in range(num_own)
        ]
        self._down = [
            RowParallelLinear(build, DOWN, intermediate_size, hidden_size, bias=bias, group=within)
            for _ in range(num_own)
        ]
        self._shared = shared
        self._shared_gate = (
            None
            if shared is None or shared.gate is None
            else Linear(replace(build, scheme=DENSE), hidden_size, (1,), bias=False)
        )
        self._packed: PackedExperts | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        weights, chosen = self._router(x)
        if len(self._gate_up) < self._num_experts:
            chosen = chosen - self._first
            elsewhere = (chosen < 0) | (chosen >= len(self._gate_up))
            weights = weights.masked_fill(elsewhere, 0.0)
            chosen = chosen.masked_fill(elsewhere, 0)
        out = self._over.all_reduce(self._experts(x, chosen, weights))
        if self._shared is None:
            return out
        beside = self._shared.body(x)
        if self._shared_gate is not None:
            self._kernels.gate_rows(beside, self._shared_gate(x))
        return out + beside

    @property
    def _experts(self) -> PackedExperts:
        if self._packed is None:
            raise RuntimeError(
                "these experts are not packed; call the model's finalize() after loading"
            )
        return self._packed

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]:
        """As FeedForward.steps, which there are none of here."""
        raise ConfigError("an expert sees only some tokens, so that its inputs cannot be tapped")
        yield x  # which makes this a generator

    def targets(self) -> dict[str, Target]:
        files = self._files
        found = self._router.targets()
        found |= self._each(files) if isinstance(files, PerExpert) else self._fused(files)
        if self._shared is not None:
            found |= prefixed(self._shared.name, self._shared.body.targets())
            if self._shared_gate is not None:
                put = partial(self._shared_gate.put, 0)
                found[f"{self._shared.gate}.weight"] = Target((1, self._sizes[0]), put)
        return found

    def _each(self, files: PerExpert) -> dict[str, Target]:
        names = {GATE: files.gate, UP: files.up, DOWN: files.down}
        found: dict[str, Target] = {}
        for index in range(self._num_experts):
            own = index - self._first
            is_own = 0 <= own < len(self._gate_up)
            targets = self._targets_of(own if is_own else 0)
            for name, target in targets.items():
                part, _, kind = name.partition(".")
                found[f"experts.{index}.{names[part]}.{kind}"] = (
                    target if is_own else unused(target.shape)
                )
        return found

    def _targets_of(self, own: int) -> dict[str, Target]:
        return self._gate_up[own].targets() | self._down[own].targets()

    def _fused(self, files: Fused) -> dict[str, Target]:
        hidden, inner = self._sizes
        shapes: dict[str, tuple[int, ...]] = {
            files.gate_up: (2 * inner, hidden),
            files.down: (hidden, inner),
        }
        if files.transposed:
            shapes = {name: shape[::-1] for name, shape in shapes.items()}
        kinds = [("weight", files.gate_up, files.down)]
        found: dict[str, Target] = {}
        if files.biases is not None:
            kinds.append(("bias", *files.biases))
            shapes |= {files.biases[0]: (2 * inner,), files.biases[1]: (hidden,)}
        for kind, gate_up, down in kinds:
            for name, put in ((gate_up, self._put_gates), (down, self._put_outputs)):
                found[name] = Target((self._num_experts, *shapes[name]), partial(put, kind))
        return found

    def _put_gates(self, kind: str, tensor: Tensor) -> None:
        def place(targets: dict[str, Target], expert: Tensor) -> None:
            inner = self._sizes[1]
            is_interleaved = isinstance(self._files, Fused) and self._files.interleaved
            halves = (
                (expert[0::2], expert[1::2]) if is_interleaved else (expert[:inner], expert[inner:])
            )
            gate, up = halves
            targets[f"{GATE}.{kind}"].place(gate)
            targets[f"{UP}.{kind}"].place(up)

        self._put_own(kind, tensor, place)

    def _put_outputs(self, kind: str, tensor: Tensor) -> None:
        def place(targets: dict[str, Target], expert: Tensor) -> None:
            targets[f"{DOWN}.{kind}"].place(expert)

        self._put_own(kind, tensor, place)

    def _put_own(
        self, kind: str, tensor: Tensor, place: Callable[[dict[str, Target], Tensor], None]
    ) -> None:
        """Place this rank's experts of a fused tensor, each [outputs, inputs] or [outputs]."""
        turned = isinstance(self._files, Fused) and self._files.transposed and kind == "weight"
        for own in range(len(self._gate_up)):
            expert = tensor[self._first + own]
            place(self._targets_of(own), expert.T if turned else expert)

    def pack(self) -> None:
        self._router.pack()
        for up, down in zip(self._gate_up, self._down, strict=True):
            up.linear.pack()
            down.linear.pack()
        self._packed = self._kernels.pack_experts(
            [layer.linear.packed for layer in self._gate_up],
            [layer.linear.packed for layer in self._down],
            self._activation,
            self._limit,
        )
        if self._shared is not None:
            self._shared.body.pack()
        if self._shared_gate is not None:
            self._shared_gate.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As FeedForward.record."""
        program.refuse_sum_over(self._over.size)
        out = self._router.record(program, x, self._experts, self._sizes[0])
        if self._shared is None:
            return out
        beside = self._shared.body.record(program, x)
        if self._shared_gate is not None:
            gate = program.buffer(1)
            program.add(Multiply(x=x, layer=self._shared_gate.packed, out=gate))
            program.add(GateRows(gate=gate, residual=beside))
        program.add(Add(x=beside, residual=out))
        return out
