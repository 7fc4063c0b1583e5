"""Ranks of one machine that find each other in a folder."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch import Tensor

from sapwood.distributed.meeting import Meeting

CPU = torch.device("cpu")


def test_groups_of_a_folder(tmp_path: Path) -> None:
    def meet(rank: int) -> Tensor:
        meeting = Meeting.in_folder(tmp_path, timeout_s=60.0)
        first = meeting.group("first", range(2), rank, CPU, on_one_machine=True)
        second = meeting.group("second", range(2), rank, CPU)
        x = torch.tensor([[rank + 1]])
        return torch.cat((first.all_gather(x), second.all_reduce(x)), dim=1)

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(meet, range(2)))
    assert [one.tolist() for one in found] == [[[1, 2, 3]]] * 2


def test_rows_for_each_rank_over_gloo(tmp_path: Path) -> None:
    counts = torch.tensor([[1, 2, 0], [0, 0, 0], [3, 1, 1]])

    def meet(rank: int) -> list[int]:
        meeting = Meeting.in_folder(tmp_path, timeout_s=60.0)
        group = meeting.group("all", range(3), rank, CPU)
        to = torch.arange(3).repeat_interleave(counts[rank])
        rows = torch.stack((torch.full_like(to, rank), to), dim=1).to(torch.uint8)
        found: list[int] = group.all_to_all(rows, counts).tolist()
        return found

    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(meet, range(3)))
    assert found == [[[0, 0]] + 3 * [[2, 0]], 2 * [[0, 1]] + [[2, 1]], [[2, 2]]]
