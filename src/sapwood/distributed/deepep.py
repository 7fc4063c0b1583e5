"""DeepEP, a library that sends rows between GPUs which NVLink joins, where it is installed.

Only what an exchange of rows needs: its buffers in normal mode, on one machine.

Source: https://github.com/deepseek-ai/DeepEP, versions 1.2 and 2 (whose `Buffer` is the same)."""

from __future__ import annotations

import importlib
import importlib.util
from typing import Any, Protocol

import msgspec
import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group

LIBRARY = "deep_ep"
_NUM_RANKS = (2, 4, 8)
"""For which DeepEP has settings, of ranks that NVLink joins."""
_MOST_CHOSEN = 32
"""A warp's lanes hold the experts that one token chose."""
_ROW_BYTES = 32
"""Half a row is copied at a time, in pieces of 16 bytes."""


class Buffer(Protocol):
    """What is used of deep_ep.Buffer; all ranks call it in the same order.

    An event is returned last each time; by default a call ends when its results are there.
    """

    def get_dispatch_layout(
        self, topk_idx: Tensor, num_experts: int
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Any]:
        """(rows for each rank [ranks] int32, None on one machine, rows for each expert [experts]
        int32, whether a row goes to a rank [T, ranks] bool, event)

        topk_idx  [T, k] int64, experts of all ranks, of which each has equally many; -1: none
        """
        ...

    def dispatch(
        self,
        x: Tensor,
        *,
        num_tokens_per_rank: Tensor,
        num_tokens_per_rdma_rank: Tensor | None,
        is_token_in_rank: Tensor,
        num_tokens_per_expert: Tensor,
        topk_idx: Tensor,
        topk_weights: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor, list[int], Any, Any]:
        """(rows that came, by rank [R, size]; experts of this rank that they chose [R, k], -1 for
        others; their weights [R, k] fp32, 0 for others; rows of each expert; handle; event)"""
        ...

    def combine(self, x: Tensor, handle: Any) -> tuple[Tensor, Tensor | None, Any]:
        """(for each row that was sent the sum of what ranks give for it [T, size], None, event)

        x  [R, size], for the rows that came
        """
        ...


def why_not(
    *, device: torch.device, dtype: torch.dtype, num_ranks: int, row_size: int, num_chosen: int
) -> str | None:
    """Why DeepEP cannot send such rows; None: it can.

    row_size    numbers in a row
    num_chosen  experts that a token chooses
    """
    if device.type != "cuda":
        return f"it runs on cuda, not on {device.type}"
    if importlib.util.find_spec(LIBRARY) is None:
        return (
            "the package deep_ep is not installed; build it as "
            "https://github.com/deepseek-ai/DeepEP says"
        )
    if num_ranks not in _NUM_RANKS:
        return f"it is for 2, 4 or 8 ranks on one machine, not for {num_ranks}"
    if dtype != torch.bfloat16:
        return f"it sends bfloat16, not {dtype}; set --dtype bfloat16"
    if row_size * dtype.itemsize % _ROW_BYTES:
        return f"a row has {row_size} numbers, which {_ROW_BYTES // dtype.itemsize} does not divide"
    if num_chosen > _MOST_CHOSEN:
        return f"a token chooses {num_chosen} experts, more than {_MOST_CHOSEN}"
    return None


def open_buffer(counting: Group, *, row_bytes: int, library: Any = None) -> Buffer:
    """This rank's buffer; all ranks open theirs at once. ConfigError if DeepEP cannot.

    counting   the ranks, which exchange numbers in the host's memory
    row_bytes  of the longest row that is sent
    library    what stands for the package deep_ep; None: that package
    """
    try:
        found: Any = library or importlib.import_module(LIBRARY)
        size = counting.size
        hints = [
            config.get_nvl_buffer_size_hint(row_bytes, size)
            for config in (
                found.Buffer.get_dispatch_config(size),
                found.Buffer.get_combine_config(size),
            )
        ]
        buffer: Buffer = found.Buffer(None, num_nvl_bytes=max(hints), comm=HostComm(counting))
    # What the library raises where NVLink, its build or the GPU does not do.
    except (ImportError, AssertionError, AttributeError, TypeError, RuntimeError) as error:
        raise ConfigError(
            f"--moe-a2a-backend deepep: DeepEP cannot start ({error or type(error).__name__}); it "
            "needs GPUs that NVLink joins; use --moe-a2a-backend torch"
        ) from error
    return buffer


class HostComm:
    """What DeepEP uses of an mpi4py communicator: how ranks tell each other where their memory is.

    It gets one since our groups are not torch.distributed's own (see meeting.py).
    """

    def __init__(self, group: Group) -> None:
        self._group = group

    def Get_rank(self) -> int:  # noqa: N802  # mpi4py's name
        return self._group.rank

    def Get_size(self) -> int:  # noqa: N802
        return self._group.size

    def allgather(self, value: int | bytes | bytearray | None) -> list[int | bytearray | None]:
        """Every rank's value, by rank; bytes come as bytearray, as DeepEP has them."""
        own = torch.frombuffer(bytearray(msgspec.msgpack.encode(value)), dtype=torch.uint8)
        sizes = self._group.all_gather(torch.tensor([[len(own)]]))[0].tolist()
        padded = F.pad(own, (0, max(sizes) - len(own)))[None]
        rows = self._group.all_gather(padded).view(self._group.size, max(sizes))
        return [
            _DECODER.decode(bytes(row[:size].tolist()))
            for row, size in zip(rows, sizes, strict=True)
        ]


_DECODER: msgspec.msgpack.Decoder[int | bytearray | None] = msgspec.msgpack.Decoder(
    int | bytearray | None
)
