"""A whole step in one call into C++.

The same ops as a model's own forward, without Python between them: at one row, calls and result
tensors cost a tenth of a small model's step, more where memory is faster.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol, assert_never

import torch
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.cpu import _native
from sapwood.kernels.cpu.experts import NativeExperts, bias_address, routing_tuple
from sapwood.kernels.cpu.head_products import HeadProducts
from sapwood.kernels.cpu.latent import has_rows, latent_tuple, rows_tuple
from sapwood.kernels.cpu.linear import Linear
from sapwood.kernels.cpu.low_rank import NO_ADAPTERS, NativeLowRank, adapter_tuple
from sapwood.kernels.cpu.quantized import WEIGHT_KINDS, QuantizedLinear
from sapwood.kernels.cpu.states import delta_tuple, gated_norm_tuple, scan_tuple, states_tuple
from sapwood.kernels.cpu.tensors import (
    ACTIVATIONS,
    address_of,
    cache_layout,
    check_embedding,
    check_indices,
    dtype_of,
    lengths_of,
    per_head,
    state_layout,
    table_of,
)
from sapwood.kernels.low_rank import AdapterRows, LowRankLayer
from sapwood.kernels.ops.sampling import SamplingOps
from sapwood.kernels.packed import PackedLinear
from sapwood.kernels.recording import (
    Activate,
    Add,
    AddLowRank,
    AddPositions,
    Attend,
    CannotRecord,
    ChooseKeys,
    Clip,
    Embed,
    GateColumns,
    GateRows,
    Join,
    KeepStates,
    Logits,
    Mix,
    Multiply,
    MultiplyHeads,
    Norm,
    NormColumns,
    Op,
    Program,
    ResizeHeads,
    RotateAndWrite,
    RotateAndWriteLatent,
    Scale,
    ScaleByPosition,
    ScaleColumns,
    SelectRows,
    TakeColumns,
    Xielu,
    finish_logits,
)
from sapwood.kernels.recording_buffers import Buffer
from sapwood.kernels.recording_states import Convolve, DeltaRule, GatedNorm, SelectiveScan
from sapwood.kernels.step_memory import plan_memory

NOWHERE = -1
GroupShape = tuple[int, tuple[int, int, int, int, int]]
"""A cache group, and a shape as PlanningKernels.plan takes it."""


class PlanningKernels(SamplingOps, Protocol):
    """What a recorded step wants of the kernels that record it."""

    @property
    def context(self) -> _native.Context: ...

    def plan(
        self,
        batch: AttentionBatch,
        shape: tuple[int, int, int, int, int],
        windows: tuple[int, ...] = (0,),
    ) -> _native.AttentionPlan: ...


class NativeStep:
    """Keeps the model and the KV caches alive; one step at a time.

    kv_caches  per layer (keys, values), each [num_pages, Hk, page_size, D] or in 8 bits; or the
               states of a convolution, [num_slots, C, L - 1], and then a recurrent one
    Raises     CannotRecord if the compiled module lacks an op, and ValueError if a weight or a
               cache does not fit the program
    """

    def __init__(
        self,
        kernels: PlanningKernels,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> None:
        before, after = program.split()
        if not after or not isinstance(after[-1], Logits):
            raise CannotRecord("its result is no logits")
        widths, places = plan_memory([*before, *after])
        builder = _Builder(program, widths, places, kv_caches, group_of_layer)
        for op in before:
            builder.add(op)
        builder.step.select()
        for op in after:
            builder.add(op)
        self._kernels = kernels
        self._keep = (program, tuple(kv_caches))
        self._step = builder.step
        self._windows = builder.windows
        self._embeddings = builder.embeddings
        self._chooses_keys = builder.chooses_keys
        self._result = after[-1]
        # Kept: fresh memory costs the system a fault per page, 0.5 ms per step of 32 requests.
        self._logits = torch.empty((0, self._result.vocab_size))

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
        """Logits [S, vocab] of the rows at logits_index [S]; writes every layer's cache, and
        `states` [T, the program's states_width] unless None.

        `write_index`, `batches` and `slots` have one value per cache group. The first three are
        [T]; all are int64 and contiguous, as in ForwardBatch.
        Raises IndexError if one of them holds an index outside its table; nothing is written then.
        """
        num_tokens, num_logits = token_ids.numel(), logits_index.numel()
        check_indices(token_ids, "token_ids", num_tokens)
        check_indices(positions, "positions", num_tokens)
        for one in write_index:
            check_indices(one, "write_index", num_tokens)
        check_indices(logits_index, "logits_index", num_logits)
        lengths = lengths_of(batches[0])  # of the requests, which are the same in all groups
        for slot in slots:
            if slot is not None:
                check_indices(slot, "slots", lengths[2])
        told = 0 if states is None else self._check_states(states, num_tokens)
        plans = [
            self._kernels.plan(batches[group], shape, tuple(windows))
            for (group, shape), windows in self._windows.items()
        ]
        tables = [table_of(batch) for batch in batches] if self._chooses_keys else []
        every = selected = NO_ADAPTERS
        vectors: list[Tensor | None] = []
        if adapters is not None:
            every, selected = map(adapter_tuple, adapters)
            vectors = [self._changed(op, token_ids) for op in self._embeddings]
        if num_logits > self._logits.shape[0]:
            self._logits = torch.empty((num_logits, self._result.vocab_size))
        logits = self._logits[:num_logits]
        self._step.run(
            self._kernels.context, plans, token_ids.data_ptr(), positions.data_ptr(),
            [one.data_ptr() for one in write_index], num_tokens, logits_index.data_ptr(),
            num_logits, logits.data_ptr(),
            [0 if slot is None else slot.data_ptr() for slot in slots], *lengths,
            every, selected, told,
            [0 if vector is None else vector.data_ptr() for vector in vectors], tables,
        )  # fmt: skip
        result = self._result
        return finish_logits(self._kernels, logits, result.scale, result.soft_cap, result.bias)

    def _changed(self, op: Embed, token_ids: Tensor) -> Tensor | None:
        """What takes the place of an op's result in this step, if anything does."""
        vectors = op.changed(token_ids)
        if vectors is None:
            return None
        dtype, wanted = self._keep[0].dtype, (token_ids.numel(), op.out.width)
        if vectors.shape != wanted or vectors.dtype != dtype:
            raise ValueError(
                f"vectors of tokens are {list(wanted)} {dtype}, not {list(vectors.shape)} "
                f"{vectors.dtype}"
            )
        return vectors.contiguous()

    def _check_states(self, states: Tensor, num_tokens: int) -> int:
        """The address of memory that takes the states of a step."""
        program, _ = self._keep
        wanted = (num_tokens, program.states_width)
        if states.shape != wanted or states.dtype != program.dtype or not states.is_contiguous():
            raise ValueError(
                f"the step's states are {list(wanted)} {program.dtype}, contiguous, but the memory "
                f"for them is {list(states.shape)} {states.dtype}"
            )
        return states.data_ptr()


class _Builder:
    """Hands a program to the compiled module, op by op, checked."""

    def __init__(
        self,
        program: Program,
        widths: Sequence[int],
        places: Mapping[Buffer, int],
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int],
    ) -> None:
        self._like = torch.empty(0, dtype=program.dtype)
        self._states_width = program.states_width
        self._places = places
        self._kv_caches = kv_caches
        self.step = _native.RecordedStep(dtype_of(self._like), list(widths))
        self._group_of_layer = group_of_layer
        self.windows: dict[GroupShape, set[int]] = {}
        self.embeddings: list[Embed] = []
        self.chooses_keys = False

    def add(self, op: Op) -> None:
        at = self._places
        match op:
            case Embed():
                check_embedding(op.weight, self._like.dtype)
                vocab, hidden = op.weight.shape
                kind = WEIGHT_KINDS[op.weight.dtype]
                self.step.embed(
                    kind, op.weight.data_ptr(), vocab, hidden, op.scale, len(self.embeddings),
                    at[op.out],
                )  # fmt: skip
                self.embeddings.append(op)
            case Norm():
                self._add_norm(op)
            case Multiply():
                weight = self._weight(op.layer, op.out.width, op.x.width)
                self.step.multiply(at[op.x], weight, at[op.out])
            case AddLowRank():
                self._add_low_rank(op)
            case RotateAndWrite():
                self._add_rotation(op)
            case Attend():
                self._add_attention(op)
            case ChooseKeys():
                self._add_choice(op)
            case RotateAndWriteLatent():
                self._add_latent_rotation(op)
            case MultiplyHeads():
                self._add_heads(op)
            case TakeColumns():
                _check_columns(op.x, op.first, op.out.width)
                self.step.take_columns(at[op.x], op.x.width, op.first, op.out.width, at[op.out])
            case Join():
                if op.out.width != op.x.width + op.y.width:
                    raise ValueError(f"{op.x.width} and {op.y.width} columns do not fit their sum")
                self.step.join(at[op.x], op.x.width, at[op.y], op.y.width, at[op.out])
            case ResizeHeads():
                self._add_resized_heads(op)
            case Convolve():
                self._add_convolution(op)
            case GatedNorm():
                self._add_gated_norm(op)
            case DeltaRule():
                self._add_delta_rule(op)
            case SelectiveScan():
                self._add_scan(op)
            case Activate():
                activation = ACTIVATIONS[op.activation]
                self.step.activate(at[op.x], activation, op.gated, op.out.width, at[op.out])
            case Add():
                _check_columns(op.residual, op.first, op.x.width)
                self.step.add(
                    at[op.x], op.x.width, at[op.residual], op.first, op.residual.width
                )  # fmt: skip
            case Scale():
                self.step.scale(at[op.residual], op.residual.width, op.factor)
            case GateRows():
                parts = op.gate.width
                self.step.gate_rows(at[op.gate], at[op.residual], parts, op.residual.width // parts)
            case GateColumns():
                self._add_gate(op)
            case Mix():
                self._add_mixture(op)
            case AddPositions():
                self._add_positions(op)
            case NormColumns():
                self._add_norm_of_columns(op)
            case ScaleColumns():
                factors, shifts = (
                    address_of(tensor, self._like, op.factors.numel(), "a factor of columns")
                    for tensor in (op.factors, op.shifts)
                )
                self.step.scale_columns(
                    at[op.residual], op.residual.width, op.first, op.factors.numel(), factors,
                    shifts,
                )  # fmt: skip
            case ScaleByPosition():
                self._add_scale_by_position(op)
            case Clip():
                self.step.clip(at[op.residual], op.residual.width, op.limit)
            case Xielu():
                self.step.xielu(at[op.x], op.above, op.below, op.x.width, at[op.out])
            case KeepStates():
                more = NOWHERE if op.more is None else at[op.more]
                self.step.keep_states(
                    at[op.x], more, op.x.width, op.first, self._states_width
                )  # fmt: skip
            case SelectRows():
                self.step.select_rows(at[op.x], op.x.width, at[op.out])
            case Logits():
                self._add_logits(op)
            case _:
                assert_never(op)

    def _add_norm(self, op: Norm) -> None:
        residual = NOWHERE if op.residual is None else self._places[op.residual]
        weight, bias = (
            address_of(tensor, self._like, op.x.width, "a norm's weight")
            for tensor in (op.weight, op.bias)
        )
        self.step.norm(
            self._places[op.x], residual, op.centered, weight, bias, op.x.width, op.eps,
            self._places[op.out],
        )  # fmt: skip

    def _add_positions(self, op: AddPositions) -> None:
        num_rows, width = op.table.shape
        if width != op.residual.width or op.table.dtype != self._like.dtype:
            raise ValueError(
                f"learned positions {list(op.table.shape)} {op.table.dtype} do not fit "
                f"{op.residual.width} columns of {self._like.dtype}"
            )
        if not op.table.is_contiguous():
            raise ValueError("learned positions must be contiguous")
        self.step.add_positions(
            self._places[op.residual], op.table.data_ptr(), op.first, num_rows - op.first, width
        )

    def _add_norm_of_columns(self, op: NormColumns) -> None:
        weight, bias = (
            address_of(tensor, self._like, op.size, "a norm's weight")
            for tensor in (op.weight, op.bias)
        )
        columns = (op.residual.width, op.first, op.size, op.count)
        self.step.norm_columns(
            self._places[op.residual], columns, op.centered, weight, bias, op.eps
        )

    def _add_scale_by_position(self, op: ScaleByPosition) -> None:
        if op.factors.dtype != torch.float32 or not op.factors.is_contiguous():
            raise ValueError("factors by position must be float32 and contiguous")
        self.step.scale_by_position(
            self._places[op.residual], op.residual.width, op.factors.data_ptr(),
            op.factors.numel(),
        )  # fmt: skip

    def _add_low_rank(self, op: AddLowRank) -> None:
        additions = _additions(op.layer, op.x.width, op.residual.width)
        self.step.low_rank(
            self._places[op.x], op.x.width, additions, self._places[op.residual], op.residual.width
        )

    def _add_logits(self, op: Logits) -> None:
        weight = self._weight(op.layer, op.vocab_size, op.x.width)
        additions = None
        if op.additions is not None:
            additions = _additions(op.additions, op.x.width, op.vocab_size)
        self.step.logits(self._places[op.x], weight, additions, op.vocab_size)

    def _add_mixture(self, op: Mix) -> None:
        if not isinstance(op.experts, NativeExperts):
            raise CannotRecord("some of its experts have no native form")
        router = self._weight(op.router, op.num_experts, op.x.width)
        op.routing.check(op.num_experts)
        if op.num_identity and op.taken is not op.x:
            raise CannotRecord("what experts that give what they take would take is no router's")
        if op.taken.width != op.experts.hidden_size:
            raise ValueError(f"experts of {op.experts.hidden_size} inputs get {op.taken.width}")
        first, last = (
            [_additions(layer, *sizes) for layer in side]
            for side, sizes in zip(op.additions or ((), ()), op.experts.shapes, strict=True)
        )
        self.step.mix(
            self._places[op.x], self._places[op.taken], router,
            bias_address(op.bias, op.num_experts),
            routing_tuple(op.routing), op.num_identity, op.experts.native, first, last,
            self._places[op.out],
        )  # fmt: skip

    def _add_rotation(self, op: RotateAndWrite) -> None:
        if op.cos_sin.dtype != torch.float32 or not op.cos_sin.is_contiguous():
            raise ValueError("cos_sin must be float32 and contiguous")
        max_positions, rotary_dim = op.cos_sin.shape
        cache = self._cache(op) if op.num_kv_heads else (0, 0, 0, 0, 0, 0, 1)
        self.step.rotate_and_write(
            self._places[op.x], (op.num_heads, op.num_kv_heads, op.head_dim),
            address_of(op.q_norm, self._like, op.head_dim, "q_norm"),
            address_of(op.k_norm, self._like, op.head_dim, "k_norm"),
            op.eps, op.cos_sin.data_ptr(), max_positions, rotary_dim, cache, self._group(op),
            self._places[op.out],
        )  # fmt: skip

    def _add_attention(self, op: Attend) -> None:
        cache, traits = self._cache(op), op.traits
        *_, num_pages, page_size = cache
        if op.sparse and not self.chooses_keys:
            raise CannotRecord("its first layers take keys that no layer has chosen")
        shape = (op.num_heads, op.num_kv_heads, op.head_dim, page_size, num_pages)
        window = traits.window or 0
        key = (self._group(op), shape)
        self.windows.setdefault(key, set()).add(window)
        sinks, alibi = (
            per_head(tensor, op.num_heads, name)
            for name, tensor in (("sinks", traits.sinks), ("alibi", traits.alibi))
        )
        self.step.attend(
            self._places[op.x], shape[:3], list(self.windows).index(key), cache, op.scale,
            (window, traits.soft_cap or 0.0, sinks, alibi), self._places[op.out], op.rank or 0,
            op.sparse,
        )  # fmt: skip

    def _add_choice(self, op: ChooseKeys) -> None:
        head_dim, rest = divmod(op.queries.width, op.num_heads)
        if rest:
            raise ValueError(f"queries of {op.num_heads} heads do not fit their buffer")
        if head_dim % _native.HEAD_DIM_STEP:
            raise CannotRecord(f"an indexer has heads of {head_dim} entries")
        self.chooses_keys = True
        self.step.choose_keys(
            self._places[op.x], self._places[op.queries],
            self._weight(op.weights, op.num_heads, op.x.width), op.scale, op.num_heads, head_dim,
            rows_tuple(self._cache_of(op.layer)[1], self._like, head_dim), op.num_chosen,
            self._group(op),
        )  # fmt: skip

    def _add_latent_rotation(self, op: RotateAndWriteLatent) -> None:
        rank = op.norm.numel()
        if not has_rows(op.row, rank):
            raise CannotRecord(f"latent attention has rows of {rank} and {op.row - rank} entries")
        key_dim, rest = divmod(op.residual.width, op.num_heads)
        if rest or op.row > op.x.width:
            raise ValueError(f"a row of {op.row} entries or its queries do not fit their buffers")
        form = latent_tuple(op.num_heads, key_dim, op.row, op.norm, op.eps, op.cos_sin, self._like)
        self.step.rotate_latent(
            self._places[op.x], op.x.width, self._places[op.residual], form,
            rows_tuple(self._cache_of(op.layer)[op.cache], self._like, op.row), self._group(op),
        )  # fmt: skip

    def _add_heads(self, op: MultiplyHeads) -> None:
        if not isinstance(op.layer, HeadProducts):
            raise CannotRecord(f"a {type(op.layer).__name__} has no native form")
        heads, num_out, num_in = op.layer.sizes
        widths = (heads * (num_in + op.kept), heads * (num_out + op.kept))
        if (op.x.width, op.out.width) != widths or op.layer.dtype != self._like.dtype:
            raise ValueError(f"products of {heads} heads do not fit their buffers")
        self.step.multiply_heads(self._places[op.x], op.layer.native, op.kept, self._places[op.out])

    def _add_resized_heads(self, op: ResizeHeads) -> None:
        _check_columns(op.x, op.first, op.count * op.size)
        new_size, rest = divmod(op.out.width - op.first, op.count)
        if rest:
            raise ValueError(f"{op.count} heads do not fill {op.out.width - op.first} columns")
        self.step.resize_heads(
            self._places[op.x], op.x.width, op.first, op.count, op.size, new_size,
            self._places[op.out],
        )  # fmt: skip

    def _add_convolution(self, op: Convolve) -> None:
        states, each = self._cache_of(op.layer)[0], isinstance(op.weight, Buffer)
        weight, weights = op.weight, NOWHERE
        if isinstance(weight, Buffer):
            weights = self._places[weight]
            weight = self._like.new_empty(op.out.width, weight.width // op.out.width)
        layout = state_layout(states, weight, op.bias, self._like)
        if not 2 <= layout.length <= _native.MAX_CONV_LENGTH:
            raise CannotRecord(f"a convolution has {layout.length} factors per channel")
        num_columns = (3 if op.gated else 1) * layout.channels
        if op.first + num_columns > op.x.width or op.out.width != layout.channels:
            raise ValueError(f"a convolution of {num_columns} columns does not fit its buffers")
        self.step.convolve(
            self._places[op.x], op.x.width, op.first, op.gated, op.silu, layout.channels,
            layout.length, 0 if each else weight.data_ptr(), weights,
            address_of(op.bias, self._like, layout.channels, "bias"), states.data_ptr(),
            layout.state_stride, layout.num_slots, self._group(op), self._places[op.out],
        )  # fmt: skip

    def _add_gate(self, op: GateColumns) -> None:
        width = op.residual.width
        if op.first + width > op.gate.width:
            raise ValueError(f"a gate of {width} columns does not fit its buffer")
        self.step.gate_columns(
            self._places[op.gate], op.first, op.gate.width, self._places[op.residual], width
        )

    def _add_gated_norm(self, op: GatedNorm) -> None:
        if op.first + op.x.width > op.gate.width or op.out.width != op.x.width:
            raise ValueError(f"a gated norm of {op.x.width} columns does not fit its buffers")
        self.step.gated_norm(
            self._places[op.x], self._places[op.gate], op.first, op.gate.width,
            address_of(op.weight, self._like, op.x.width, "a gated norm's weight"),
            gated_norm_tuple(op.form, op.x.width), self._places[op.out],
        )  # fmt: skip

    def _add_delta_rule(self, op: DeltaRule) -> None:
        form = op.form
        fits = (op.qkv.width, op.out.width) == (form.num_channels, form.out_size)
        fits = fits and op.decay_first + form.shift.shape[0] <= op.decay.width
        if not fits or op.write_first + form.num_heads > op.write.width:
            raise ValueError(f"a delta rule of {form.num_heads} heads does not fit its buffers")
        states = self._cache_of(op.layer)[1]
        self.step.delta_rule(
            self._places[op.qkv],
            (self._places[op.decay], op.decay_first, op.decay.width),
            (self._places[op.write], op.write_first, op.write.width),
            delta_tuple(form),
            states_tuple(states, (form.num_heads, form.key_dim, form.value_dim)),
            self._group(op),
            self._places[op.out],
        )

    def _add_scan(self, op: SelectiveScan) -> None:
        space = op.space
        if space.state_size > _native.MAX_STATE_SIZE:
            raise CannotRecord(f"a state space layer has keys of {space.state_size} numbers")
        keys = space.num_groups * space.state_size
        widths = (space.width, keys, keys, space.num_steps, space.width)
        inputs = []
        for buffer, first, width in zip(
            (op.x, op.b, op.c, op.dt, op.gate), op.firsts, widths, strict=True
        ):
            if buffer is not None and first + width > buffer.width:
                raise ValueError(f"a scan of {width} columns does not fit its buffer")
            # The compiled module counts places from 1 here, so that 0 is none.
            inputs.append(
                (0, 0, 0) if buffer is None else (self._places[buffer] + 1, first, buffer.width)
            )
        if op.out.width != space.width:
            raise ValueError(f"a scan of {space.width} channels does not fit its buffer")
        states = states_tuple(self._cache_of(op.layer)[op.tensor], space.shape)
        self.step.scan(
            inputs, scan_tuple(space), states, self._group(op), self._places[op.out]
        )  # fmt: skip

    def _group(
        self,
        op: RotateAndWrite
        | RotateAndWriteLatent
        | Attend
        | ChooseKeys
        | Convolve
        | DeltaRule
        | SelectiveScan,
    ) -> int:
        return self._group_of_layer[op.layer] if self._group_of_layer else 0

    def _cache(self, op: RotateAndWrite | Attend) -> tuple[int, int, int, int, int, int, int]:
        """The layer's cache, as the compiled module takes it."""
        caches = self._cache_of(op.layer)
        is_latent = isinstance(op, Attend) and op.rank is not None
        keys, values = (caches[0], caches[0]) if is_latent else caches
        layout = cache_layout(keys, values, self._like, op.num_kv_heads, op.head_dim)
        return (
            keys.data_ptr(), values.data_ptr(), layout.key_stride, layout.value_stride, layout.kv,
            layout.num_pages, layout.page_size,
        )  # fmt: skip

    def _cache_of(self, layer: int) -> tuple[Tensor, ...]:
        if layer >= len(self._kv_caches):
            raise ValueError(f"{len(self._kv_caches)} KV caches, but the model has a layer {layer}")
        return self._kv_caches[layer]

    def _weight(self, layer: PackedLinear, num_out: int, num_in: int) -> _native.LinearWeight:
        if not isinstance(layer, Linear | QuantizedLinear):
            raise CannotRecord(f"a {type(layer).__name__} has no native form")
        if layer.sizes != (num_out, num_in) or layer.dtype != self._like.dtype:
            raise ValueError(
                f"a linear layer is {list(layer.sizes)} {layer.dtype} but must be "
                f"[{num_out}, {num_in}] {self._like.dtype}"
            )
        weight = layer.native_weight
        if weight.k != num_in:
            raise CannotRecord(
                f"a linear layer has {num_in} inputs; a bf16 step needs an even number"
            )
        return weight


def _check_columns(buffer: Buffer, first: int, number: int) -> None:
    if first + number > buffer.width:
        raise ValueError(f"{number} columns from {first} on are not there")


def _additions(layer: LowRankLayer, num_in: int, num_out: int) -> _native.LowRankLayer:
    if not isinstance(layer, NativeLowRank):
        raise CannotRecord(f"a {type(layer).__name__} has no native form")
    if layer.sizes != (num_in, num_out):
        raise ValueError(f"additions of {layer.sizes} to a layer of other sizes")
    return layer.native
