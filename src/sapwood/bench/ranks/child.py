"""One rank of `sapwood bench ranks`, a process of its own."""

from __future__ import annotations

from pathlib import Path

import msgspec
import torch

from sapwood.base.process import end_with_parent, read_first_line
from sapwood.bench.ranks.expert_rows import measure_expert_rows
from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.ranks.paired import Paired
from sapwood.bench.ranks.sums import measure_sums
from sapwood.distributed.meeting import Meeting

RESULT = "result"
"""The file of rank 0 in the ranks' folder."""


class RankTask(msgspec.Struct, frozen=True):
    """What a rank is told. folder: where the ranks meet."""

    folder: str
    rank: int
    options: RanksOptions


class Measured(msgspec.Struct, frozen=True):
    """sums  own: in shared memory, other: over gloo; None: these ranks cannot share memory
    expert_rows  own: sent to their experts, other: gathered"""

    sums: list[Paired] | None
    expert_rows: list[Paired]


def main() -> None:
    task = msgspec.json.decode(read_first_line(), type=RankTask)
    end_with_parent()
    torch.set_num_threads(1)
    options, folder = task.options, Path(task.folder)
    meeting = Meeting.in_folder(folder, timeout_s=options.timeout)
    ranks, cpu = range(options.num_ranks), torch.device("cpu")
    memory = meeting.group("memory", ranks, task.rank, cpu, on_one_machine=True)
    counting = meeting.group("counting", ranks, task.rank, cpu, on_one_machine=True)
    gloo = meeting.group("gloo", ranks, task.rank, cpu)
    with torch.inference_mode():
        measured = Measured(
            sums=None if memory.memory is None else measure_sums(options, memory, gloo),
            expert_rows=measure_expert_rows(options, memory, counting),
        )
    if task.rank == 0:
        (folder / RESULT).write_bytes(msgspec.json.encode(measured))


if __name__ == "__main__":
    main()
