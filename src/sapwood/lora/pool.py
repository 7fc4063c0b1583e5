"""The adapters of a rank: on the host by their ids, and in the slots that steps read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sapwood.kernels.low_rank import AdapterRows
from sapwood.kernels.transfer import upload_one
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.lora.adapter import Adapter


class AdapterPool:
    """Adapters come in any thread; slots change in the thread that runs steps, in their order.

    On a CPU the slots have the adapters of the host themselves; on a GPU they have copies.
    """

    def __init__(self, device: torch.device, context: AdapterContext) -> None:
        """`context` is that of the model's layers."""
        self.context = context
        self._device = device
        self._adapters: dict[str, Adapter] = {}
        self._slots: dict[int, Adapter] = {}

    def add(self, adapter_id: str, adapter: Adapter) -> None:
        self._adapters[adapter_id] = adapter

    def remove(self, adapter_id: str) -> None:
        """Forget the adapter; a slot that has it keeps it until the slot is placed anew."""
        self._adapters.pop(adapter_id, None)

    def place(self, slot: int, adapter_id: str) -> None:
        """From the next step on the slot has this adapter; "": none."""
        old = self._slots.pop(slot, None)
        new = self._adapters.get(adapter_id)
        if old is not None:
            for site in old.additions:
                site.place(slot, None)
        if new is not None:
            for site, addition in new.additions.items():
                site.place(slot, addition.to(self._device))
            self._slots[slot] = new

    def of_step(
        self, slot_of_token: NDArray[np.int64], selected: NDArray[np.int64]
    ) -> StepAdapters | None:
        """The adapters of a step; None if no token has one.

        slot_of_token  [T] the slot of each token's adapter, -1: none
        selected       [S] the tokens whose logits are wanted, as places in the step
        """
        adapted = slot_of_token[slot_of_token >= 0]
        if not len(adapted):
            return None
        slots = [int(slot) for slot in np.unique(adapted)]
        return StepAdapters(
            rows=self._grouped(slot_of_token, slots),
            selected=self._grouped(slot_of_token[selected], slots),
            is_covered=all(self._slots[slot].is_covered for slot in slots),
        )

    def _grouped(self, slot_of_row: NDArray[np.int64], slots: list[int]) -> AdapterRows:
        groups = [np.flatnonzero(slot_of_row == slot) for slot in slots]
        starts = np.cumsum([0, *map(len, groups)])
        rows = upload_one(np.concatenate(groups), np.int64, self._device)
        return AdapterRows(slots=tuple(slots), starts=tuple(starts.tolist()), rows=rows)
