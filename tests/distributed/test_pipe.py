"""Hidden states between two stages. Threads play the ranks, over gloo on this machine."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sapwood.distributed.meeting import Meeting
from sapwood.distributed.pipe import MOST_UNTAKEN, GroupPipe

CPU = torch.device("cpu")


@pytest.fixture
def pipes() -> list[GroupPipe]:
    """Of two ranks; they must be used by two threads."""
    meeting, port = Meeting.opened("127.0.0.1", timeout_s=20.0)
    other = Meeting.joined("127.0.0.1", port, own_host="127.0.0.1", timeout_s=20.0)

    def make(rank: int) -> GroupPipe:
        group = (meeting, other)[rank].group("pp", [5, 3], (5, 3)[rank], CPU)
        assert group.process_group is not None
        return GroupPipe(group.process_group, group.rank, dtype=torch.float32, device=CPU)

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(make, range(2)))


def test_what_is_sent_comes_in_its_order(pipes: list[GroupPipe]) -> None:
    sent = [torch.randn(rows, 6)[:, :5] for rows in (3, 1, 0, 40)]
    for x in sent:  # nobody has asked for any of them yet
        pipes[0].send(x)
    for x in sent:
        assert torch.equal(pipes[1].receive(len(x)), x)


def test_a_stage_that_is_far_ahead_waits(pipes: list[GroupPipe]) -> None:
    count, ahead = 3 * MOST_UNTAKEN, threading.Event()

    def send() -> None:
        for index in range(count):
            pipes[0].send(torch.full((1, 2), float(index)))
        ahead.set()

    sender = threading.Thread(target=send)
    sender.start()
    assert not ahead.wait(0.05), "it waits, however long"
    assert [float(pipes[1].receive(1)[0, 0]) for _ in range(count)] == list(range(count))
    sender.join()


def test_another_data_type_is_refused(pipes: list[GroupPipe]) -> None:
    with pytest.raises(TypeError, match=r"exchange torch\.float32, not torch\.bfloat16"):
        pipes[0].send(torch.zeros(1, 2, dtype=torch.bfloat16))
