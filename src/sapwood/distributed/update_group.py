"""A group with processes outside of this program, whose rank 0 sends weights.

Trainers make it with torch's own functions: a store at rank 0's address, below it the group's name
twice and the kind of device, as `torch.distributed` names the keys of a group.
"""

from __future__ import annotations

from datetime import timedelta
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import PrefixStore, ProcessGroupGloo, Store, TCPStore

from sapwood.base.errors import InvalidRequest
from sapwood.distributed.groups import ProcessGroup

JOIN_TIMEOUT_S = 300.0
"""How long the others may take to join, and to send a tensor."""
BACKENDS = ("gloo", "nccl")


class UpdateGroup:
    """This process's place in such a group.

    Raises InvalidRequest if the group cannot be joined."""

    def __init__(
        self,
        name: str,
        *,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        backend: str,
        timeout_s: float = JOIN_TIMEOUT_S,
    ) -> None:
        if backend not in BACKENDS:
            raise InvalidRequest(f"backend is {backend!r} but must be gloo or nccl")
        if not 0 < rank < world_size:
            raise InvalidRequest(
                f"rank_offset is {rank} but must be in 1 .. world_size - 1: rank 0 sends weights"
            )
        self._timeout = timedelta(seconds=timeout_s)
        device = "cuda" if backend == "nccl" else "cpu"
        try:
            meeting = TCPStore(host, port, world_size, False, self._timeout)
            store = PrefixStore(f"{device}/", PrefixStore(f"{name}/", PrefixStore(name, meeting)))
            make = self._nccl if backend == "nccl" else self._gloo
            self._group = make(store, rank, world_size)
        except (RuntimeError, ValueError, ImportError) as error:
            raise InvalidRequest(f"the group {name!r} cannot be joined: {error}") from error
        self._meeting = meeting
        self.device = torch.device(device)

    def receive(self, tensor: Tensor) -> None:
        """Take what rank 0 broadcasts. InvalidRequest if it does not come."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.rootTensor = 0
        options.timeout = self._timeout
        try:
            self._group.broadcast([tensor], options).wait()
        except RuntimeError as error:
            raise InvalidRequest(f"the weights did not come: {error}") from error

    def _gloo(self, store: Store, rank: int, size: int) -> ProcessGroup:
        return cast(ProcessGroup, ProcessGroupGloo(store, rank, size, self._timeout))

    def _nccl(self, store: Store, rank: int, size: int) -> ProcessGroup:
        from torch._C._distributed_c10d import ProcessGroupNCCL  # not in every build of torch

        options = ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return cast(ProcessGroup, ProcessGroupNCCL(store, rank, size, options))
