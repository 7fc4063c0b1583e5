"""A model's step as a program: ops over named buffers, which kernels may run in one call.

Each layer of a model appends the ops that it would call (`Program.add`). A program says nothing of
memory: see step_memory.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve, DeltaRule, GatedNorm, SelectiveScan

if TYPE_CHECKING:
    from sapwood.kernels.activations import Activation
    from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits
    from sapwood.kernels.low_rank import AdapterRows, LowRankLayer
    from sapwood.kernels.ops.sampling import SamplingOps
    from sapwood.kernels.packed import PackedExperts, PackedHeads, PackedLinear
    from sapwood.kernels.routing import Routing


class CannotRecord(Exception):
    """These kernels cannot run this model's step in one call; the text says why."""


# The ops. Of their buffers, `out` is written, `residual` is read and written, and others are read.
# Each computes, bit by bit, what the op of `Kernels` with the same parameters computes.


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Embed:
    """out = the rows of `weight` [vocab, width] of the step's tokens, times `scale`.

    changed  for the tokens [T] of a step whose adapters change their vectors, the result [T, width]
             instead; else None
    """

    weight: Tensor
    scale: float
    out: Buffer
    changed: Callable[[Tensor], Tensor | None] = lambda token_ids: None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Norm:
    """out = norm(x), or with a residual: residual += x, and then out = norm(residual).

    weight    [width]
    bias      [width] of a LayerNorm that has one, or None
    centered  whether the mean is subtracted, as a LayerNorm does; else it is an RMSNorm
    """

    x: Buffer
    residual: Buffer | None
    weight: Tensor
    bias: Tensor | None
    centered: bool
    eps: float
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Multiply:
    """out = the linear layer of x."""

    x: Buffer
    layer: PackedLinear
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AddLowRank:
    """residual += what the rows' adapters add to the linear layer of x."""

    x: Buffer
    layer: LowRankLayer
    residual: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotateAndWrite:
    """out [rows, Hq * D] = the rotated queries in x; keys and values go to the layer's KV cache.

    x         [rows, (Hq + 2 Hk) * D], as in Kernels.qk_norm_rope_write_kv; so are the others
    layer     index of the layer, which has its own KV cache; unused if there are no key heads
    """

    x: Buffer
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    cos_sin: Tensor
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Attend:
    """out [rows, Hq * D] = attention of the queries x to the KV cache of a layer.

    rank  of a latent cache, whose rows are keys, and their first `rank` entries values: then out is
          [rows, Hq * rank]; None: keys and values are two caches
    sparse  whether tokens attend only to the keys that the last ChooseKeys has chosen for them; a
            cache must be latent then
    """

    x: Buffer
    layer: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    traits: AttentionTraits
    out: Buffer
    rank: int | None = None
    sparse: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ChooseKeys:
    """The keys that tokens attend to, as Kernels.choose_keys chooses them, for the sparse attention
    that follows. While no request has more than `num_chosen` tokens, all keys are chosen.

    x        the weights of heads are the fp32 result of the linear layer `weights`, times `scale`
    queries  [rows, H * D]
    layer    index of the layer, the second of whose caches has the keys
    """

    x: Buffer
    queries: Buffer
    weights: PackedLinear
    scale: float
    layer: int
    num_heads: int
    num_chosen: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RotateAndWriteLatent:
    """The queries in `residual` are rotated in place; a row goes to a cache of the layer.

    x         its first columns are `latent` of Kernels.norm_rope_write_latent; so are the others
    residual  [rows, Hq * (N + P)]
    layer     index of the layer; `cache` says which of its caches
    row       C + P
    """

    x: Buffer
    residual: Buffer
    layer: int
    num_heads: int
    row: int
    norm: Tensor
    eps: float
    cos_sin: Tensor
    cache: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class MultiplyHeads:
    """out [rows, H * (out + kept)] = the linear layer of each head of x [rows, H * (in + kept)]."""

    x: Buffer
    layer: PackedHeads
    kept: int
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TakeColumns:
    """out [rows, width] = the columns of x from `first` on."""

    x: Buffer
    first: int
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Join:
    """out = the columns of x, and then those of y."""

    x: Buffer
    y: Buffer
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ResizeHeads:
    """out = the columns of x before `first`, and then `count` heads of `size` columns, each filled
    up with zeros or cut to as many as out has room for."""

    x: Buffer
    first: int
    count: int
    size: int
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Activate:
    """out = activation(x), or if gated, of x = [gate, up]: activation(gate) * up."""

    x: Buffer
    activation: Activation
    gated: bool
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Add:
    """residual += x, or of its columns those from `first` on, if x has fewer."""

    x: Buffer
    residual: Buffer
    first: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Scale:
    """residual *= factor"""

    residual: Buffer
    factor: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateRows:
    """residual *= the logistic function of gate [rows, n]: each gate is for one of n equal parts of
    a row."""

    gate: Buffer
    residual: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class GateColumns:
    """residual [rows, n] *= the logistic function of the gate's n columns from `first` on"""

    gate: Buffer
    first: int
    residual: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Mix:
    """out = the experts that a router of x chooses, of `taken`.

    router   the linear layer whose fp32 result `Kernels.route` takes
    bias     the correction bias, or None
    num_identity  experts, the last that the router knows, which give what they take
    additions  of the rows' adapters to each expert's first and last layer; None: no adapter can add
    """

    x: Buffer
    taken: Buffer
    router: PackedLinear
    num_experts: int
    bias: Tensor | None
    routing: Routing
    experts: PackedExperts
    out: Buffer
    additions: tuple[Sequence[LowRankLayer], Sequence[LowRankLayer]] | None = None
    num_identity: int = 0


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AddPositions:
    """residual += the rows of `table` at the tokens' positions + `first`.

    table  [positions + first, width] of the program's dtype
    """

    table: Tensor
    first: int
    residual: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class NormColumns:
    """`count` norms per row, each of `size` columns, from column `first` on, in place.

    weight    [size], or None for a LayerNorm without one
    bias      [size] of a LayerNorm that has one, or None
    centered  as in Norm
    """

    residual: Buffer
    first: int
    size: int
    count: int
    weight: Tensor | None
    bias: Tensor | None
    centered: bool
    eps: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaleColumns:
    """Columns from `first` on times `factors` [n], and then plus `shifts` [n] unless None."""

    residual: Buffer
    first: int
    factors: Tensor
    shifts: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class ScaleByPosition:
    """residual *= factors[position] [positions] fp32, row by row"""

    residual: Buffer
    factors: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Clip:
    """residual's entries are cut to -limit .. limit"""

    residual: Buffer
    limit: float


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Xielu:
    """out = xielu(x), as in Kernels.xielu."""

    x: Buffer
    above: float
    below: float
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class KeepStates:
    """Of the states that the step hands out, the columns from `first` on = x, or x + more."""

    x: Buffer
    more: Buffer | None
    first: int


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SelectRows:
    """out = the rows of x whose logits are wanted."""

    x: Buffer
    out: Buffer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Logits:
    """The result [rows, vocab] in fp32: the output layer of x, plus `bias`, times `scale`, capped.

    bias       [vocab] fp32, or None
    soft_cap   a logit z becomes soft_cap * tanh(z / soft_cap); None: it stays as it is
    additions  of the rows' adapters to the output layer of x; None: no adapter can add
    """

    x: Buffer
    layer: PackedLinear
    vocab_size: int
    scale: float
    soft_cap: float | None
    bias: Tensor | None = None
    additions: LowRankLayer | None = None


def finish_logits(
    kernels: SamplingOps,
    logits: Tensor,
    scale: float,
    soft_cap: float | None,
    bias: Tensor | None = None,
) -> Tensor:
    """What `Logits` does to the products, in place; returns `logits`."""
    if bias is not None:
        logits.add_(bias)
    if scale != 1.0:
        logits.mul_(scale)
    if soft_cap is not None:
        kernels.soft_cap(logits, soft_cap)
    return logits


Op = (
    Embed
    | Norm
    | Multiply
    | AddLowRank
    | RotateAndWrite
    | Attend
    | ChooseKeys
    | RotateAndWriteLatent
    | MultiplyHeads
    | TakeColumns
    | Join
    | ResizeHeads
    | Convolve
    | GatedNorm
    | DeltaRule
    | SelectiveScan
    | Activate
    | Add
    | Scale
    | GateRows
    | GateColumns
    | Mix
    | AddPositions
    | NormColumns
    | ScaleColumns
    | ScaleByPosition
    | Clip
    | Xielu
    | KeepStates
    | SelectRows
    | Logits
)


_OF_ALL_ROWS = (Attend, Convolve, DeltaRule, SelectiveScan, KeepStates)
"""Ops in which tokens look at others, or that hand out something of all tokens."""


class LeftOut(Hashable, Protocol):
    """A rule that says which batches are to be computed op by op."""

    def applies(self, batch: AttentionBatch) -> bool: ...


class Program:
    """The ops of a step, in their order.

    dtype  of activations, norms and dense caches
    states_width  columns of the states that the step hands out; 0: it hands out none
    left_out  which batches the program does not compute
    """

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype
        self.states_width = 0
        self.left_out: set[LeftOut] = set()
        self._ops: list[Op] = []
        self._num_buffers = 0

    def buffer(self, width: int) -> Buffer:
        """A new buffer, which nothing has written yet."""
        self._num_buffers += 1
        return Buffer(self._num_buffers - 1, width)

    def add(self, op: Op) -> None:
        self._ops.append(op)

    def keep_states(self, x: Buffer, more: Buffer | None) -> None:
        """Hand out x, or x + more, of all tokens of the step: beside what was kept before."""
        self.add(KeepStates(x=x, more=more, first=self.states_width))
        self.states_width += x.width

    def refuse_sum_over(self, num_ranks: int) -> None:
        """CannotRecord if several ranks would add their results up after the next op."""
        if num_ranks > 1:
            raise CannotRecord(f"{num_ranks} ranks add their results up between its ops")

    def split(self) -> tuple[Sequence[Op], Sequence[Op]]:
        """(ops on the rows of all tokens, ops on the rows whose logits are wanted).

        Tokens know of each other by attention and states alone. After the last of these, and after
        all states are handed out, nothing looks at the other rows any more, so the second part
        begins with the selection of rows."""
        of_all = [index for index, op in enumerate(self._ops) if isinstance(op, _OF_ALL_ROWS)]
        first = of_all[-1] + 1 if of_all else len(self._ops)
        before, after = self._ops[:first], self._ops[first:]
        written = {buffer for op in before for buffer in written_by(op)}
        needed = sorted(written & set(_read_before_written(after)), key=lambda one: one.index)
        selected = {buffer: self.buffer(buffer.width) for buffer in needed}
        selections = [SelectRows(x=old, out=new) for old, new in selected.items()]
        return before, [*selections, *(_renamed(op, selected) for op in after)]


def buffers_of(op: Op) -> Iterator[tuple[str, Buffer]]:
    """(name of the field, buffer) for all buffers of an op."""
    for field in fields(op):
        value = getattr(op, field.name)
        if isinstance(value, Buffer):
            yield field.name, value


def written_by(op: Op) -> list[Buffer]:
    return [buffer for name, buffer in buffers_of(op) if name in ("out", "residual")]


def read_by(op: Op) -> list[Buffer]:
    return [buffer for name, buffer in buffers_of(op) if name != "out"]


def _read_before_written(ops: Iterable[Op]) -> Iterator[Buffer]:
    written: set[Buffer] = set()
    for op in ops:
        yield from (buffer for buffer in read_by(op) if buffer not in written)
        written.update(written_by(op))


def _renamed(op: Op, names: Mapping[Buffer, Buffer]) -> Op:
    changed: dict[str, Any] = {name: names.get(old, old) for name, old in buffers_of(op)}
    return replace(op, **changed)


class RecordedStep(Protocol):
    """A model's step as one call. It keeps the weights and the KV caches alive."""

    def __call__(
        self,
        token_ids: Tensor,
        positions: Tensor,
        write_index: Sequence[Tensor],
        batches: Sequence[AttentionBatch],
        logits_index: Tensor,
        slots: Sequence[Tensor | None] = (),
        adapters: tuple[AdapterRows, AdapterRows] | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """Logits [S, vocab] in fp32 of the rows at logits_index [S]; writes every layer's cache.

        `write_index`, `batches` and `slots` have one value per cache group; slots [R] are those of
        a group of states, and None in others; without states there need not be any. `adapters` are
        those of all rows, and those of the rows at logits_index, counted among them. `states`
        [T, the program's states_width] of its dtype is written, unless None. The first three
        arguments are [T]; all indices are int64 and contiguous. The result is bitwise that of
        the single ops. Until the next step the caller may keep it and write to it.
        Raises IndexError, before anything is written, if an index is outside its table.
        """
        ...
