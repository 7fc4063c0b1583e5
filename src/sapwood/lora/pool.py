"""The adapters of a rank: on the host by their ids, and in the slots that steps read."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from sapwood.kernels.low_rank import AdapterRows
from sapwood.kernels.transfer import upload_one
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.lora.adapter import Adapter
from sapwood.lora.copies import AdapterCopies, Additions


class AdapterPool:
    """Adapters come in any thread; slots change in the thread that runs steps, in their order.

    On a CPU the slots have the adapters of the host themselves; on a GPU they have copies, which
    are made when a slot changes, or before that beside the steps (`bring`).
    """

    def __init__(
        self, device: torch.device, context: AdapterContext, *, overlaps: bool = False
    ) -> None:
        """An empty pool.

        context   of the model's layers
        overlaps  whether every adapter is brought before a slot has it
        """
        self.context = context
        self._copies = AdapterCopies(device) if overlaps else None
        self._placed: dict[int, Additions] = {}
        self._device = device
        self._adapters: dict[str, Adapter] = {}
        self._slots: dict[int, Adapter] = {}

    def add(self, adapter_id: str, adapter: Adapter) -> None:
        self._adapters[adapter_id] = adapter

    def remove(self, adapter_id: str) -> None:
        """Forget the adapter; a slot that has it keeps it until the slot is placed anew."""
        self._adapters.pop(adapter_id, None)
        if self._copies is not None:
            self._copies.forget(adapter_id)

    def bring(self, adapter_id: str) -> None:
        """Begin to copy the adapter to the device, beside the steps; `arrived` tells when it is
        there. An adapter that was removed meanwhile is left out."""
        assert self._copies is not None, "only a pool that overlaps is asked to"
        adapter = self._adapters.get(adapter_id)
        if adapter is not None:
            self._copies.bring(adapter_id, adapter)

    def arrived(self) -> list[str]:
        """Ids of the adapters that are there, each told once."""
        return [] if self._copies is None else self._copies.arrived()

    def place(self, slot: int, adapter_id: str) -> None:
        """From the next step on the slot has this adapter; "": none."""
        old = self._slots.pop(slot, None)
        new = self._adapters.get(adapter_id)
        if old is not None:
            for site in old.additions:
                site.place(slot, None)
            if self._copies is not None:
                self._copies.drop(self._placed.pop(slot))
        if new is None:
            return
        if self._copies is None:
            placed: Additions = {site: one.to(self._device) for site, one in new.additions.items()}
        else:
            placed = self._placed[slot] = self._copies.take(adapter_id)
        for site, addition in placed.items():
            site.place(slot, addition)
        self._slots[slot] = new

    def close(self) -> None:
        if self._copies is not None:
            self._copies.close()

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
