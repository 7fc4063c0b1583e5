"""A feed-forward layer of experts, of which each token uses a few.

Source: Shazeer et al. 2017, arXiv:1701.06538; shared experts: Dai et al. 2024, arXiv:2401.06066."""

from __future__ import annotations

from collections.abc import Collection, Generator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.packed import PackedExperts
from sapwood.kernels.recording import Add, CannotRecord, GateRows, Multiply, Program
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.torch_ops.experts import activation_of
from sapwood.layers.adapted_experts import AdaptedExperts
from sapwood.layers.build import Build
from sapwood.layers.expert_exchange import ExpertExchange
from sapwood.layers.expert_slots import ExpertSlots, SlotShare
from sapwood.layers.layer import FeedForward
from sapwood.layers.linear import (
    ColumnParallelLinear,
    Linear,
    RowParallelLinear,
    even_part,
)
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.router import Router
from sapwood.layers.streams import WholeLinear
from sapwood.layers.targets import FusedIn, Target, elsewhere, into_all, prefixed

GATE, UP, DOWN = "gate", "up", "down"


@dataclass(frozen=True, slots=True, kw_only=True)
class PerExpert:
    """A checkpoint with tensors for each expert: experts.<number>.<name>.weight, and with `bias`
    likewise a bias. It may have them as OF_TRANSFORMERS says instead."""

    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    bias: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Fused:
    """A checkpoint with one tensor for the first layers of all experts, and one for their outputs.
    It may have tensors of each expert instead, as in PerExpert.

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


OF_TRANSFORMERS = Fused(
    gate_up="experts.gate_up_proj",
    down="experts.down_proj",
    biases=("experts.gate_up_proj_bias", "experts.down_proj_bias"),
)
"""What transformers has in memory, and writes where it is told not to split it."""


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Latent:
    """A linear layer before the experts that are chosen, and one after their sum.

    inward, outward  their names in the checkpoint
    size             of what the experts take and give
    """

    inward: str
    outward: str
    size: int


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
        weighs_inputs: bool = False,
        shared: Shared | None = None,
        num_identity: int = 0,
        gated: bool = True,
        latent: Latent | None = None,
    ) -> None:
        """A layer without weights.

        intermediate_size  of each expert
        files              how the checkpoint has the experts' weights
        limit              as in Kernels.pack_experts
        weighs_inputs      whether an expert's weight multiplies what the expert takes, instead of
                           what it gives
        num_identity       further experts, the last that the router knows, which give what they
                           take
        gated              whether experts have gates; else they are down(activation(up(x)))
        latent             what the experts that are chosen take instead of x; None: x
        """
        self._kernels = build.kernels
        expert_size = hidden_size if latent is None else latent.size
        self._hidden_size = hidden_size
        self._sizes = (expert_size, intermediate_size)
        self._gated = gated
        self._latent = latent
        self._inward = self._outward = None
        if latent is not None:
            self._inward = WholeLinear(build, hidden_size, expert_size)
            self._outward = WholeLinear(build, expert_size, hidden_size)
        self._activation = activation
        self._limit = limit
        self._weighs_inputs = weighs_inputs
        self._router = router
        self._num_experts = num_experts
        self._num_identity = num_identity
        self._files = files
        groups = build.groups
        within = groups.tp if groups.expert is None else groups.expert
        self._over = groups.tp
        self._exchange = build.exchange
        share = SlotShare.of(
            num_experts, build.num_redundant_experts, groups.ep_rank, groups.ep_size
        )
        counts = build.experts is not None and build.experts.counts
        self.slots = ExpertSlots(num_experts, share, build.device, counts=counts)
        self._next: tuple[int, ...] | None = None
        if build.experts is not None:
            build.experts.add(self)
        num_own = share.num_own
        parts = tuple(
            even_part(name, intermediate_size, within) for name in ((GATE, UP) if gated else (UP,))
        )
        bias = files.bias if isinstance(files, PerExpert) else files.biases is not None
        self._gate_up = [
            ColumnParallelLinear(build, expert_size, parts, bias=bias) for _ in range(num_own)
        ]
        self._down = [
            RowParallelLinear(build, DOWN, intermediate_size, expert_size, bias=bias, group=within)
            for _ in range(num_own)
        ]
        self._adapted = (
            None
            if build.adapters is None
            else AdaptedExperts(build, self._gate_up, self._down, self._activated)
        )
        self._shared = shared
        self._shared_gate = (
            None
            if shared is None or shared.gate is None
            else Linear(replace(build, scheme=DENSE), hidden_size, (1,), bias=False)
        )
        self._packed: PackedExperts | None = None

    @property
    def sends_rows(self) -> bool:
        return self._exchange is not None

    @property
    def can_be_captured(self) -> bool:
        return self._experts.can_be_captured

    def __call__(self, x: Tensor) -> Tensor:
        """x [T, hidden] -> [T, hidden]"""
        if self._exchange is not None and not len(x):
            return self._take_part(self._exchange, x)
        weights, chosen, kept = self._routed(x)
        taken = x if self._inward is None else self._inward(x)
        out = self._mixed(x, taken, chosen, weights)
        if self._outward is not None:
            out = self._outward(out)
        if kept is not None:
            out = out + kept
        if self._shared is None:
            return out
        beside = self._shared.body(x)
        if self._shared_gate is not None:
            self._kernels.gate_rows(beside, self._shared_gate(x))
        return out + beside

    def _mixed(self, x: Tensor, taken: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """What all ranks' experts give for `taken`, [T, size]; x is what the router was given."""
        mix = self._mix_of_weighed if self._weighs_inputs else self._experts
        if self._exchange is not None:
            slots = self.slots.find_everywhere(x, chosen, weights)
            return self._exchange(taken, slots, weights, mix, num_own=self.slots.share.num_own)
        chosen, weights = self.slots.find(x, chosen, weights)
        if self._adapted is None:
            out = mix(taken, chosen, weights)
        else:
            out = self._adapted(taken, chosen, weights, mix, weighs_inputs=self._weighs_inputs)
        return self._over.all_reduce(out)

    def _take_part(self, exchange: ExpertExchange, x: Tensor) -> Tensor:
        """Compute what other ranks ask of this one, which has no rows of its own."""
        mix = self._mix_of_weighed if self._weighs_inputs else self._experts
        none = torch.empty(0, self._router.num_chosen, dtype=torch.int64, device=x.device)
        num_own = self.slots.share.num_own
        exchange(x.new_empty(0, self._sizes[0]), none, none.float(), mix, num_own=num_own)
        return x

    def _routed(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """(weights [T, k], experts [T, k], the sum over experts that give what they take)"""
        weights, chosen = self._router(x)
        if not self._num_identity:
            return weights, chosen, None
        is_identity = chosen >= self._num_experts
        # In fp64, so that the order in which they are added up does not matter.
        share = (weights * is_identity).sum(dim=1, keepdim=True, dtype=torch.float64).float()
        weights = weights.masked_fill(is_identity, 0.0)
        return weights, chosen.masked_fill(is_identity, 0), (x.float() * share).to(x.dtype)

    def _activated(self, gates: Tensor) -> Tensor:
        """What an expert's output layer takes, from what the first layers give."""
        activate = activation_of(self._kernels, self._activation, self._limit, gated=self._gated)
        return activate(gates)

    def _mix_of_weighed(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        """As PackedExperts, but each expert takes x times its weight."""
        num_tokens, num_chosen = chosen.shape
        weighed = (x[:, None] * weights[..., None]).to(x.dtype).flatten(0, 1)
        is_own = (weights != 0).to(weights.dtype)  # other ranks' experts have no weight here
        out = self._experts(weighed, chosen.view(-1, 1), is_own.view(-1, 1))
        return out.view(num_tokens, num_chosen, -1).sum(dim=1)

    @property
    def _experts(self) -> PackedExperts:
        """Made at the first use: a conversion taps the linear layers instead, in `steps`."""
        if self._packed is None:
            self._packed = self._kernels.pack_experts(
                [layer.linear.packed for layer in self._gate_up],
                [layer.linear.packed for layer in self._down],
                self._activation,
                self._limit,
                gated=self._gated,
            )
        return self._packed

    def steps(self, x: Tensor) -> Generator[Tensor, None, Tensor]:
        """As FeedForward.steps: an expert's layers get the rows of x whose tokens chose it, perhaps
        none. Only for one rank."""
        if self._inward is not None:
            raise ConfigError("experts between two linear layers cannot be converted")
        weights, chosen, kept = self._routed(x)
        total = torch.zeros_like(x, dtype=torch.float32)
        for expert, (gate_up, down) in enumerate(zip(self._gate_up, self._down, strict=True)):
            rows, place = torch.nonzero(chosen == expert, as_tuple=True)
            weight = weights[rows, place, None].float()
            own = x[rows]
            if self._weighs_inputs:
                own, weight = (own * weight).to(x.dtype), torch.ones_like(weight)
            yield own
            expanded = x.new_empty(0, self._sizes[1])
            if len(rows):
                expanded = self._activated(gate_up(own))
            yield expanded
            if len(rows):
                total.index_add_(0, rows, down(expanded).float() * weight)
        out = total.to(x.dtype) if kept is None else total.to(x.dtype) + kept
        if self._shared is None:
            return out
        beside = yield from self._shared.body.steps(x)
        if self._shared_gate is not None:
            self._kernels.gate_rows(beside, self._shared_gate(x))
        return out + beside

    def targets(self) -> dict[str, Target]:
        found = self._router.targets() | self._targets_of_experts()
        if self._latent is not None and self._inward is not None and self._outward is not None:
            found |= prefixed(self._latent.inward, self._inward.targets())
            found |= prefixed(self._latent.outward, self._outward.targets())
        if self._shared is not None:
            found |= prefixed(self._shared.name, self._shared.body.targets())
            if self._shared_gate is not None:
                put = partial(self._shared_gate.put, 0)
                found[f"{self._shared.gate}.weight"] = Target((1, self._hidden_size), put)
        return found

    def _targets_of_experts(self) -> dict[str, Target]:
        """Of all experts of this rank; while some move, of those that come to it."""
        own = self.slots.share.own(self._next or self.slots.placement)
        filled = range(len(own)) if self._next is None else self._changing(own)
        files = self._files if isinstance(self._files, PerExpert) else PerExpert()
        names = {GATE: files.gate, UP: files.up, DOWN: files.down}
        found: dict[str, Target] = {}
        for index in range(self._num_experts):
            at = [slot for slot in filled if own[slot] == index]
            of_slots = [self._gate_up[slot].targets() | self._down[slot].targets() for slot in at]
            shapes = of_slots[0] if of_slots else self._any_targets
            for name, any_target in shapes.items():
                part, _, kind = name.partition(".")
                targets = [of_slot[name] for of_slot in of_slots]
                found[f"experts.{index}.{names[part]}.{kind}"] = replace(
                    into_all(targets) if targets else elsewhere(any_target.shape),
                    fused_in=self._fused_in(part, kind, index),
                    of_expert=True,
                )
        return found

    @property
    def _any_targets(self) -> dict[str, Target]:
        return self._gate_up[0].targets() | self._down[0].targets()

    def _changing(self, own: Sequence[int]) -> Collection[int]:
        """This rank's slots that now have another expert than in `own`."""
        now = self.slots.share.own(self.slots.placement)
        return [slot for slot, expert in enumerate(own) if now[slot] != expert]

    def plan_move(self, placement: Sequence[int]) -> None:
        """From now on `targets` are those of the experts that come to this rank, perhaps none,
        while the layer computes as before. Then call `settle`, or `cancel`."""
        self._next = tuple(placement)

    def settle(self) -> None:
        """Compute with the new placement: the experts that come are filled, or none comes."""
        assert self._next is not None, "a move is planned"
        for slot in self._changing(self.slots.share.own(self._next)):
            self._gate_up[slot].linear.pack()
            self._down[slot].linear.pack()
            self._packed = None
        if self._next != self.slots.placement:
            self.slots.place(self._next)
        self._next = None

    def cancel(self) -> None:
        """Stay as before; only while nothing is filled."""
        self._next = None

    def _fused_in(self, part: str, kind: str, index: int) -> FusedIn | None:
        """The place of an expert's tensor in a checkpoint with fused ones."""
        files = self._files if isinstance(self._files, Fused) else OF_TRANSFORMERS
        name = files.down if part == DOWN else files.gate_up
        if kind == "bias":
            if files.biases is None:
                return None
            name = files.biases[part == DOWN]
        if part == UP and not self._gated:
            name = name.replace("gate_up", "up")
        fused = FusedIn(name=name, expert=index, num_experts=self._num_experts)
        if kind == "weight" and files.transposed:
            fused = replace(fused, transposed=True)
        if part == DOWN or not self._gated:
            return fused
        return replace(fused, part=int(part == UP), num_parts=2, takes_turns=files.interleaved)

    def pack(self) -> None:
        self._router.pack()
        for up, down in zip(self._gate_up, self._down, strict=True):
            up.linear.pack()
            down.linear.pack()
        self._packed = None
        if self._inward is not None and self._outward is not None:
            self._inward.pack()
            self._outward.pack()
        if self._shared is not None:
            self._shared.body.pack()
        if self._shared_gate is not None:
            self._shared_gate.pack()

    def record(self, program: Program, x: Buffer) -> Buffer:
        """As FeedForward.record."""
        program.refuse_sum_over(self._over.size)
        if self._weighs_inputs:
            raise CannotRecord("a recorded step has no weights of experts' inputs")
        taken = None if self._inward is None else self._inward.record(program, x)
        additions = None if self._adapted is None else self._adapted.additions
        out = self._router.record(
            program, x, self._experts, taken, additions, num_identity=self._num_identity
        )
        if self._outward is not None:
            out = self._outward.record(program, out)
        if self._shared is None:
            return out
        beside = self._shared.body.record(program, x)
        if self._shared_gate is not None:
            gate = program.buffer(1)
            program.add(Multiply(x=x, layer=self._shared_gate.packed, out=gate))
            program.add(GateRows(gate=gate, residual=beside))
        program.add(Add(x=beside, residual=out))
        return out
