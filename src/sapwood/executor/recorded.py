"""Steps that run in one call instead of op by op.

They are recorded once, when the engine starts: by the kernels, from the model's program, or else by
the device, which captures its ops (executor/captured.py). A batch that was not recorded is computed
op by op.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from sapwood.executor.sampling.sampler import SamplingOps
from sapwood.kernels.interface import Kernels
from sapwood.kernels.recording import CannotRecord, LeftOut, Program, RecordedStep
from sapwood.layers.forward_batch import ForwardBatch


class Recordable(Protocol):
    """A model that can say its step as a program; CannotRecord if it cannot."""

    def program(self, states: Collection[int] | None = None) -> Program: ...


class RecordedSteps(Protocol):
    def replay(self, batch: ForwardBatch, states: Tensor | None = None) -> Tensor | None:
        """Logits [S, vocab] of the rows at batch.logits_index; writes every layer's KV, and
        `states` [T, width of the states that were recorded] if they are wanted.

        Returns None, without having done anything, for a batch that was not recorded; the
        caller then computes it op by op. The caller may keep the logits until the next replay."""
        ...


class NothingRecorded:
    """Covers nothing."""

    def replay(self, batch: ForwardBatch, states: Tensor | None = None) -> Tensor | None:
        return None


class RecordedProgram:
    """A recorded step of the kernels.

    It covers batches of every size and mixture, as long as all tokens have ids, but for those that
    the program leaves out.
    """

    def __init__(self, step: RecordedStep, left_out: Collection[LeftOut] = ()) -> None:
        self._step = step
        self._left_out = tuple(left_out)

    def replay(self, batch: ForwardBatch, states: Tensor | None = None) -> Tensor | None:
        groups, adapters = batch.groups or (batch,), batch.adapters
        if batch.embeds is not None or batch.axes is not None:
            return None
        if adapters is not None and not adapters.is_covered:
            return None
        if any(rule.applies(batch.attention) for rule in self._left_out):
            return None
        return self._step(
            batch.token_ids,
            batch.positions,
            [group.write_index for group in groups],
            [group.attention for group in groups],
            batch.logits_index,
            [group.slots for group in batch.groups],
            None if adapters is None else (adapters.rows, adapters.selected),
            states,
        )


@dataclass(frozen=True, slots=True)
class Recorded:
    """The recorded steps, and one line for the operator with the reason of this choice.

    sampling_ops  choose tokens from the logits of these steps; None: the kernels' ops do
    """

    steps: RecordedSteps
    why: str
    sampling_ops: SamplingOps | None = None

    @property
    def is_recorded(self) -> bool:
        return not isinstance(self.steps, NothingRecorded)


def record_steps(
    model: Recordable,
    kernels: Kernels,
    kv_caches: Sequence[tuple[Tensor, ...]],
    *,
    group_of_layer: Sequence[int] = (),
    enabled: bool,
    states: Collection[int] | None = None,
    capture: Callable[[], Recorded] | None = None,
    why_not_captured: str = "",
) -> Recorded:
    """The kernels' recorded step, if there is one and the operator wants it; else a captured step.

    group_of_layer  as in ForwardBatch
    states          as in Decoder.program
    capture         makes the captured steps, if the device and the kernels can capture ops
    why_not_captured  why there is no `capture` on a device that could
    """
    if not enabled:
        return Recorded(NothingRecorded(), "disabled by --disable-graphs")
    try:
        program = model.program(states)
        step = kernels.record(program, kv_caches, group_of_layer)
    except CannotRecord as reason:
        if capture is not None and kernels.can_be_captured:
            return capture()
        why = why_not_captured or f"the {kernels.name} kernels cannot record it: {reason}"
        return Recorded(NothingRecorded(), why)
    return Recorded(RecordedProgram(step, program.left_out), "a step is one call")
