"""The LoRA adapters of the step that a rank computes."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.schema.step import StepPlan


class StepAdapterPool(Protocol):
    """See lora.pool.AdapterPool."""

    context: AdapterContext

    def place(self, slot: int, adapter_id: str) -> None: ...

    def bring(self, adapter_id: str) -> None: ...

    def of_step(
        self, slot_of_token: NDArray[np.int64], selected: NDArray[np.int64]
    ) -> StepAdapters | None: ...


def change_slots(pool: StepAdapterPool | None, plan: StepPlan) -> None:
    """Give slots the adapters that a plan says, also a plan without requests.

    pool  None: no request has an adapter"""
    for slot, adapter_id in plan.adapters:
        assert pool is not None, "only loaded adapters get slots"
        pool.place(slot, adapter_id)
    for adapter_id in plan.adapter_copies:
        assert pool is not None, "only loaded adapters are copied"
        pool.bring(adapter_id)


def knowing_adapters(
    pool: StepAdapterPool | None, batch: ForwardBatch
) -> AbstractContextManager[None]:
    """Inside, the layers know the batch's adapters."""
    if pool is None or batch.adapters is None:
        return nullcontext()
    return pool.context.of(batch.adapters)
