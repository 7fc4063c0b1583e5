"""Steps that a device has captured: its ops are queued in one call, however many they are.

A step of decodes, up to its logits, is one capture for each number of requests; from a few requests
on there is a second capture, for steps in which several requests share pages of their KV. Other
steps are captured for numbers of tokens, in pieces. Attention runs between the pieces, because its
work depends on which tokens belong to which request. A capture reads its inputs from fixed memory,
and writes hidden states or logits to fixed memory. A smaller step is padded with tokens that belong
to no request and write to a page that no request has.

If requests may have adapters, every size is captured a second time, with the adapters' additions:
so steps without adapters do no work for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood.executor.buckets import smallest_that_holds
from sapwood.executor.captured_sampling import CapturableSamplingOps, CapturedSampling
from sapwood.kernels.capture import Capture, Replayable, capture
from sapwood.kernels.interface import PLAIN, AttentionBatch, AttentionTraits, CapturedSharing
from sapwood.kernels.low_rank import CapturedAdapters
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.layers.forward_batch import ForwardBatch

Attend = Callable[..., Tensor]
Part = Callable[[AttentionBatch, int], None]
"""Computes a part of a step for a batch and its number of tokens."""
Progress = Callable[[int, int], None]
"""Called with the number of captured sizes and the number of all sizes."""

SHARING_FROM = 8
"""From this number of requests on, steps are captured a second time, to read shared pages once.

With fewer requests that saves too little.
"""


class Capturable(Protocol):
    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states of all tokens after the last norm, [T, hidden]; writes their KV."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        ...


class CapturableKernels(CapturableSamplingOps, Protocol):
    """The ops of `Kernels` that a capture needs; `Kernels` describes them."""

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor: ...

    def captured_sharing(
        self, num_requests: int, page_size: int, device: torch.device
    ) -> CapturedSharing | None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """The sizes to capture.

    decode       numbers of requests in ascending order; may be empty
    prefill      numbers of tokens in ascending order; may be empty
    max_pages    pages of one request at most
    spare_page   a page that no request has
    hidden_size  entries of a hidden state
    has_adapters  whether requests may have adapters
    """

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    max_pages: int
    page_size: int
    spare_page: int
    hidden_size: int
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    has_adapters: bool = False

    @property
    def most_tokens(self) -> int:
        return max((*self.decode, *self.prefill))

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits of decodes, twice: later computations take as much again at most."""
        return 2 * 4 * max((*self.decode, 0)) * self.vocab_size


@dataclass(frozen=True, slots=True)
class StepsWithAdapters:
    """What steps with adapters are captured with.

    context  of the model's layers
    fixed    covers the layers to which adapters may add
    """

    context: AdapterContext
    fixed: CapturedAdapters


class StepMemory:
    """The fixed memory of captured steps, for the most tokens of any.

    token_ids, positions, write_index  [most_tokens] int64
    page_table   [most requests, max_pages] int32; entries after a request's pages are old ones
    context_len  [most requests] int32
    hidden       [most_tokens, hidden_size]: the result of a step in pieces
    logits       [most requests, vocab] fp32: the result of a step of decodes
    """

    def __init__(self, plan: CapturePlan) -> None:
        num_tokens, num_requests = plan.most_tokens, max((*plan.decode, 1))
        device = plan.device
        self._no_token = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self._spare = torch.full_like(self._no_token, plan.spare_page * plan.page_size)
        self._spare_page = plan.spare_page
        self.token_ids, self.positions = self._no_token.clone(), self._no_token.clone()
        self.write_index = self._spare.clone()
        self.page_table = torch.full(
            (num_requests, plan.max_pages), plan.spare_page, dtype=torch.int32, device=device
        )
        self.context_len = torch.ones(num_requests, dtype=torch.int32, device=device)
        self.query_start = torch.arange(num_requests + 1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(num_tokens, plan.hidden_size, dtype=plan.dtype, device=device)
        self.logits = torch.zeros(num_requests, plan.vocab_size, device=device)

    def take_tokens(self, batch: ForwardBatch, size: int) -> None:
        """Take the tokens of the batch, and pad them to `size` with tokens of no request."""
        num, pad = len(batch.token_ids), size - len(batch.token_ids)
        targets = [self.token_ids[:num], self.positions[:num], self.write_index[:num]]
        sources = [batch.token_ids, batch.positions, batch.write_index]
        if pad:
            targets += [
                tensor[num:size] for tensor in (self.token_ids, self.positions, self.write_index)
            ]
            sources += [self._no_token[:pad], self._no_token[:pad], self._spare[:pad]]
        torch._foreach_copy_(targets, sources)

    def take_requests(self, attention: AttentionBatch, size: int) -> None:
        """Take the requests of the batch, which have one token each, and pad them to `size`."""
        num, width = attention.page_table.shape
        self.page_table[:num, :width].copy_(attention.page_table)
        self.context_len[:num].copy_(attention.context_len)
        if num < size:
            self.page_table[num:size, :1].fill_(self._spare_page)
            self.context_len[num:size].fill_(1)


@dataclass(slots=True)
class _AttentionCall:
    """Attention between two pieces: from q [size, Hq, D] to out, the same shape, both fixed."""

    attend: Attend
    q: Tensor
    out: Tensor
    key_cache: Tensor
    value_cache: Tensor
    more: tuple[Any, ...]
    named: dict[str, Any]

    def __call__(self, batch: AttentionBatch, num_tokens: int) -> None:
        q = self.q[:num_tokens]
        out = self.attend(q, self.key_cache, self.value_cache, batch, *self.more, **self.named)
        self.out[:num_tokens].copy_(out)


@dataclass(slots=True)
class _Pieces:
    """A step of up to `size` tokens: recorded pieces, and attention between them."""

    compute_attention: Attend
    size: int
    recorder: Capture
    spaces: dict[tuple[int, ...], tuple[Tensor, Tensor]]
    parts: list[Part] = field(default_factory=list)

    def warm_attend(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, *_: Any, **__: Any
    ) -> Tensor:
        """Make the memory that `attend` will use, because a recording must not allocate any."""
        return self._space(q)[1]

    def attend(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        _: AttentionBatch,
        *more: Any,
        **named: Any,
    ) -> Tensor:
        """End the piece that computed q, and begin the next piece."""
        space, out = self._space(q)
        space.copy_(q)
        self.add(self.recorder.end())
        call = _AttentionCall(
            self.compute_attention, space, out, key_cache, value_cache, more, named
        )
        self.parts.append(call)
        self.recorder.begin()
        return out

    def add(self, piece: Replayable) -> None:
        def replay(batch: AttentionBatch, num_tokens: int) -> None:
            piece.replay()

        self.parts.append(replay)

    def _space(self, q: Tensor) -> tuple[Tensor, Tensor]:
        """Memory for q and for the output of attention.

        Layers run one after the other, so all layers with the same shape share this memory.
        """
        shape = tuple(q.shape[1:])
        if shape not in self.spaces:
            # Sizes are captured from the largest down.
            self.spaces[shape] = (torch.zeros_like(q), torch.zeros_like(q))
        q_space, out = self.spaces[shape]
        return q_space[: self.size], out[: self.size]


@dataclass(slots=True)
class _Captures:
    """Captures by their sizes."""

    decodes: dict[int, Replayable] = field(default_factory=dict)
    sharing: dict[int, tuple[CapturedSharing, Replayable]] = field(default_factory=dict)
    prefills: dict[int, list[Part]] = field(default_factory=dict)

    def decode(self, attention: AttentionBatch, size: int) -> Replayable:
        if size in self.sharing:
            sharing, captured = self.sharing[size]
            if sharing.plan(attention):
                return captured
        return self.decodes[size]


class CapturedSteps:
    """RecordedSteps (executor/recorded.py) that a device has captured. Made by `capture_steps`.

    It covers steps of decodes up to the largest captured number of requests, and other steps up to
    the largest captured number of tokens."""

    def __init__(
        self,
        model: Capturable,
        plan: CapturePlan,
        memory: StepMemory,
        sampling_ops: CapturedSampling,
        adapters: StepsWithAdapters | None = None,
    ) -> None:
        self.sampling_ops = sampling_ops
        self._model = model
        self._plan = plan
        self._memory = memory
        self._adapters = adapters
        self.plain, self.adapted = _Captures(), _Captures()

    def replay(self, batch: ForwardBatch, states: Tensor | None = None) -> Tensor | None:
        if any(part is not None for part in (batch.token_types, batch.embeds, states)):
            return None
        if batch.adapters is not None and (self._adapters is None or not batch.adapters.is_covered):
            return None
        captures = self.plain if batch.adapters is None else self.adapted
        attention, num_tokens = batch.attention, len(batch.token_ids)
        if attention.num_decodes == num_tokens == len(attention.query_lens):
            size = smallest_that_holds(self._plan.decode, num_tokens)
            if size is not None:
                self._memory.take_tokens(batch, size)
                self._memory.take_requests(attention, size)
                self._take_adapters(batch.adapters, size)
                captures.decode(attention, size).replay()
                logits = self._memory.logits[:num_tokens]
                if len(batch.logits_index) == num_tokens:
                    return logits
                return logits.index_select(0, batch.logits_index)
        size = smallest_that_holds(self._plan.prefill, num_tokens)
        if size is None:
            return None
        self._memory.take_tokens(batch, size)
        self._take_adapters(batch.adapters, size)
        for part in captures.prefills[size]:
            part(attention, num_tokens)
        # Only the wanted rows: their number differs from step to step, so no capture computes them.
        hidden = self._memory.hidden[:num_tokens].index_select(0, batch.logits_index)
        return self._model.logits(hidden)

    def _take_adapters(self, adapters: StepAdapters | None, size: int) -> None:
        if adapters is not None and self._adapters is not None:
            self._adapters.fixed.take(adapters.rows, size)


@torch.inference_mode()
def capture_steps(
    model: Capturable,
    kernels: CapturableKernels,
    kv_caches: Sequence[tuple[Tensor, ...]],
    plan: CapturePlan,
    recorder: Capture,
    on_progress: Progress = lambda done, total: None,
    adapters: StepsWithAdapters | None = None,
) -> CapturedSteps:
    """Capture every size of the plan, the largest first, so that the smaller ones reuse its memory.

    kv_caches  hold `plan.spare_page` too
    adapters   captures steps with adapters, too; None: no step that is replayed has one"""
    memory = StepMemory(plan)
    sampling_ops = CapturedSampling(kernels, memory.logits, plan.decode)
    steps = CapturedSteps(model, plan, memory, sampling_ops, adapters)
    kinds: list[tuple[_Captures, StepsWithAdapters | None]] = [(steps.plain, None)]
    if adapters is not None:
        kinds.append((steps.adapted, adapters))
    done, total = 0, (len(plan.decode) + len(plan.prefill)) * len(kinds)
    spaces: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}
    for size in reversed(plan.prefill):
        for captures, having in kinds:
            pieces = _Pieces(kernels.paged_attention, size, recorder, spaces)
            with _adapters_of(having, size):
                captures.prefills[size] = _capture_pieces(model, memory, kv_caches, pieces)
            done += 1
            on_progress(done, total)
    for size in reversed(plan.decode):
        decode = (model, memory, kv_caches, plan, size, recorder)
        for captures, having in kinds:
            with _adapters_of(having, size):
                captures.decodes[size] = _capture_decode(*decode)
                sharing = None
                if size >= SHARING_FROM:
                    sharing = kernels.captured_sharing(size, plan.page_size, plan.device)
                if sharing is not None:
                    captures.sharing[size] = (sharing, _capture_decode(*decode, sharing))
            done += 1
            on_progress(done, total)
        sampling_ops.capture(size, recorder)
    return steps


def _adapters_of(having: StepsWithAdapters | None, size: int) -> AbstractContextManager[None]:
    """Inside, layers compute a step of that size with adapters, or without."""
    if having is None:
        return nullcontext()
    rows = having.fixed.rows(size)
    return having.context.of(StepAdapters(rows=rows, selected=rows))


def _capture_decode(
    model: Capturable,
    memory: StepMemory,
    kv_caches: Sequence[tuple[Tensor, ...]],
    plan: CapturePlan,
    size: int,
    recorder: Capture,
    sharing: CapturedSharing | None = None,
) -> Replayable:
    def compute() -> None:
        # A new batch each time: kernels keep results in a batch's cache, and the capture must
        # compute these too.
        longest = plan.max_pages * plan.page_size
        attention = AttentionBatch(
            page_table=memory.page_table[:size],
            query_start=memory.query_start[: size + 1],
            context_len=memory.context_len[:size],
            query_lens=(1,) * size,
            context_lens=(longest,) * size,
            num_decodes=size,
        )
        if sharing is not None:
            sharing.install(attention)
        hidden = model.forward(_batch(memory, kv_caches, attention, size))
        memory.logits[:size].copy_(model.logits(hidden))

    compute()  # first uses compile and allocate, which a capture must not
    return capture(recorder, compute)


def _capture_pieces(
    model: Capturable,
    memory: StepMemory,
    kv_caches: Sequence[tuple[Tensor, ...]],
    pieces: _Pieces,
) -> list[Part]:
    size = pieces.size
    # No captured op reads this: attention gets the batch of the step itself.
    attention = AttentionBatch(
        page_table=memory.page_table[:1],
        query_start=memory.query_start[:2],
        context_len=memory.context_len[:1],
        query_lens=(size,),
        context_lens=(size,),
        num_decodes=0,
    )

    def compute(attend: Attend) -> None:
        batch = _batch(memory, kv_caches, attention, size, attend)
        memory.hidden[:size].copy_(model.forward(batch))

    compute(pieces.warm_attend)
    pieces.add(capture(pieces.recorder, lambda: compute(pieces.attend)))
    return pieces.parts


def _batch(
    memory: StepMemory,
    kv_caches: Sequence[tuple[Tensor, ...]],
    attention: AttentionBatch,
    size: int,
    attend: Attend | None = None,
) -> ForwardBatch:
    return ForwardBatch(
        token_ids=memory.token_ids[:size],
        positions=memory.positions[:size],
        write_index=memory.write_index[:size],
        attention=attention,
        kv_caches=kv_caches,
        logits_index=memory.positions[:0],
        attend=attend,
    )
