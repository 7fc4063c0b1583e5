"""Copies adapters to the device beside the steps that are computed there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from sapwood.kernels.transfer import SideQueue
from sapwood.layers.adapters import Addition, Site
from sapwood.lora.adapter import Adapter

Additions = Mapping[Site, Addition]


class AdapterCopies:
    """One copy after the other, in a thread and on a queue of the device of their own.

    `bring`, `take` and `drop` are called by the thread that runs steps, the others by any.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._queue = SideQueue(device)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapter-copies")
        self._copies: dict[str, Future[Additions]] = {}
        self._told: set[str] = set()

    def bring(self, adapter_id: str, adapter: Adapter) -> None:
        """Begin to copy; `arrived` tells when the copy is there."""
        self._told.discard(adapter_id)
        self._copies[adapter_id] = self._thread.submit(self._copy, adapter)

    def arrived(self) -> list[str]:
        """Ids of adapters that are there, each told once. Raises what a copy raised."""
        found = []
        for adapter_id, copy in list(self._copies.items()):
            if copy.done() and adapter_id not in self._told:
                copy.result()
                self._told.add(adapter_id)
                found.append(adapter_id)
        return found

    def take(self, adapter_id: str) -> Additions:
        """The copy of an adapter that `arrived` has told of."""
        return self._copies.pop(adapter_id).result()

    def forget(self, adapter_id: str) -> None:
        """Nobody wants the adapter any more."""
        self._copies.pop(adapter_id, None)

    def drop(self, additions: Additions) -> None:
        """Give a copy's memory back once all steps that are queued now are done."""
        self._thread.submit(_drop, self._queue.mark(), dict(additions))

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)

    @torch.inference_mode()
    def _copy(self, adapter: Adapter) -> Additions:
        with self._queue.used():
            return {site: one.to(self._device) for site, one in adapter.additions.items()}


def _drop(wait: Callable[[], None], additions: dict[Site, Addition]) -> None:
    wait()
    additions.clear()
