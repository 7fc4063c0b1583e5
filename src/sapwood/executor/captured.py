"""Steps that a device has captured: its ops are queued in one call, however many they are.

A step of decodes, up to its logits, is one capture for each number of requests; from a few requests
on there is a second capture, for steps in which several requests share pages of their KV. Other
steps are captured for numbers of tokens, in pieces. Between the pieces run attention and whatever
else depends on which tokens belong to which request. A capture reads its inputs from fixed memory,
and writes hidden states or logits to fixed memory. A smaller step is padded with tokens that belong
to no request and write to pages and a slot that no request has.

If requests may have adapters, every size is captured a second time, with the adapters' additions:
so steps without adapters do no work for them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from sapwood.executor.buckets import smallest_that_holds
from sapwood.executor.captured_memory import CapturePlan, StepMemory
from sapwood.executor.captured_pieces import CapturedPieces, Pieces, Spaces
from sapwood.executor.captured_sampling import CapturableSamplingOps, CapturedSampling
from sapwood.kernels.attention_batch import AttentionBatch, CapturedSharing
from sapwood.kernels.capture import Capture, Replayable, capture
from sapwood.kernels.low_rank import CapturedAdapters
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.layers.forward_batch import ForwardBatch, Work

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

    def captured_sharing(
        self, num_requests: int, page_size: int, device: torch.device
    ) -> CapturedSharing | None: ...


@dataclass(frozen=True, slots=True)
class StepsWithAdapters:
    """What steps with adapters are captured with.

    context  of the model's layers
    fixed    covers the layers to which adapters may add
    """

    context: AdapterContext
    fixed: CapturedAdapters


@dataclass(slots=True)
class _Captures:
    """Captures by their sizes."""

    decodes: dict[int, Replayable] = field(default_factory=dict)
    sharing: dict[int, tuple[CapturedSharing, Replayable]] = field(default_factory=dict)
    prefills: dict[int, CapturedPieces] = field(default_factory=dict)

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
        if any(part is not None for part in (batch.token_types, batch.embeds, batch.axes, states)):
            return None
        if batch.adapters is not None and (self._adapters is None or not batch.adapters.is_covered):
            return None
        captures = self.plain if batch.adapters is None else self.adapted
        attention, num_tokens = batch.attention, len(batch.token_ids)
        if attention.num_decodes == num_tokens == len(attention.query_lens):
            size = smallest_that_holds(self._plan.decode, num_tokens)
            if size is not None:
                self._memory.take_tokens(batch, size)
                self._memory.take_requests(batch, size)
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
        pieces = captures.prefills[size]
        for part in pieces.parts:
            part(batch, num_tokens)
        # Only the wanted rows: their number differs from step to step, so no capture computes them.
        hidden = pieces.hidden[:num_tokens].index_select(0, batch.logits_index)
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

    kv_caches  hold the places of `plan.spares` too
    adapters   captures steps with adapters, too; None: no step that is replayed has one"""
    memory = StepMemory(plan)
    sampling_ops = CapturedSampling(kernels, memory.logits, plan.decode)
    steps = CapturedSteps(model, plan, memory, sampling_ops, adapters)
    kinds: list[tuple[_Captures, StepsWithAdapters | None]] = [(steps.plain, None)]
    if adapters is not None:
        kinds.append((steps.adapted, adapters))
    done, total = 0, (len(plan.decode) + len(plan.prefill)) * len(kinds)
    spaces = Spaces()
    for size in reversed(plan.prefill):
        for captures, having in kinds:
            pieces = Pieces(memory.one_request(kv_caches, size), recorder, spaces)
            with _adapters_of(having, size):
                captures.prefills[size] = _capture_pieces(model, pieces)
            done += 1
            on_progress(done, total)
    for size in reversed(plan.decode):
        decode = (model, memory, kv_caches, size, recorder)
        for captures, having in kinds:
            with _adapters_of(having, size):
                captures.decodes[size] = _capture_decode(*decode)
                sharing = None
                if size >= SHARING_FROM and plan.shares_pages:
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
    size: int,
    recorder: Capture,
    sharing: CapturedSharing | None = None,
) -> Replayable:
    def compute() -> None:
        # A new batch each time: kernels keep results in a batch's cache, and the capture must
        # compute these too.
        batch = memory.decodes(kv_caches, size)
        if sharing is not None:
            sharing.install(batch.attention)
        memory.logits[:size].copy_(model.logits(model.forward(batch)))

    compute()  # first uses compile and allocate, which a capture must not
    return capture(recorder, compute)


def _capture_pieces(model: Capturable, pieces: Pieces) -> CapturedPieces:
    def compute(between: Callable[[Work, tuple[Tensor, ...]], Tensor]) -> Tensor:
        return model.forward(replace(pieces.batch, between=between))

    hidden = pieces.spaces.like("hidden", compute(pieces.warm_up))
    pieces.add(capture(pieces.recorder, lambda: _done(hidden.copy_(compute(pieces.cut)))))
    return CapturedPieces(pieces.parts, hidden)


def _done(_: object) -> None:
    """For a call whose result nobody wants."""
