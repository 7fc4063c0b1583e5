"""How the ranks of a model find each other and form groups, without any state of the process.

torch.distributed's own functions keep one default group per process. Here each group is an object
that somebody owns, so that a program may have several engines, one after the other or at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import cast

import torch
from torch._C._distributed_c10d import FileStore, PrefixStore, ProcessGroupGloo, Store, TCPStore

from sapwood.distributed.groups import Group, ProcessGroup
from sapwood.distributed.shared_memory import share_memory
from sapwood.kernels.accelerators import accelerator_of


class Meeting:
    """The place where ranks meet. Keep it as long as its groups."""

    def __init__(self, store: Store, *, own_host: str, timeout_s: float) -> None:
        self._store = store
        self._own_host = own_host
        self._timeout = timedelta(seconds=timeout_s)

    @staticmethod
    def opened(host: str, *, timeout_s: float) -> tuple[Meeting, int]:
        """(for one of the ranks: a new meeting at a free port of this host, that port)"""
        store = TCPStore(host, 0, None, True, timedelta(seconds=timeout_s), wait_for_workers=False)
        return Meeting(store, own_host=host, timeout_s=timeout_s), int(store.port)

    @staticmethod
    def in_folder(folder: Path, *, timeout_s: float) -> Meeting:
        """For all ranks, on one machine, of a folder that no other meeting uses."""
        store = FileStore(str(folder / "meeting"))
        store.set_timeout(timedelta(seconds=timeout_s))
        return Meeting(store, own_host="127.0.0.1", timeout_s=timeout_s)

    @staticmethod
    def joined(host: str, port: int, *, own_host: str, timeout_s: float) -> Meeting:
        """For the other ranks. own_host: the address of this machine that others reach."""
        store = TCPStore(
            host, port, None, False, timedelta(seconds=timeout_s), wait_for_workers=False
        )
        return Meeting(store, own_host=own_host, timeout_s=timeout_s)

    def group(
        self,
        name: str,
        ranks: Sequence[int],
        rank: int,
        device: torch.device,
        *,
        on_one_machine: bool = False,
    ) -> Group:
        """The group of these ranks, of which `rank` is one; all of them must make it.

        name  tells the groups apart: no two of a meeting have the same
        on_one_machine  whether the ranks can share memory
        """
        if len(ranks) == 1:
            return Group()
        store = PrefixStore(name, self._store)
        own, size = list(ranks).index(rank), len(ranks)
        accelerator = accelerator_of(device)
        process_group = (
            self._gloo(store, own, size)
            if accelerator is None
            else cast(ProcessGroup, accelerator.process_group(store, own, size, self._timeout))
        )
        memory = None
        if on_one_machine and device.type == "cpu":
            memory = share_memory(store, own, size)
        return Group(rank=own, size=size, process_group=process_group, memory=memory)

    def _gloo(self, store: Store, rank: int, size: int) -> ProcessGroup:
        options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]  # torch's stubs lack it
        # Named, since gloo would otherwise ask what this machine's name stands for.
        options._devices = [ProcessGroupGloo.create_device(hostname=self._own_host)]
        options._timeout = self._timeout
        return cast(ProcessGroup, ProcessGroupGloo(store, rank, size, options))
