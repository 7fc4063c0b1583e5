"""When DeepEP can send rows, and what users are told when it cannot."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.distributed import deepep
from sapwood.distributed.deepep import HostComm
from sapwood.distributed.groups import Group
from tests.distributed import standin_deepep
from tests.models.lm.rank_threads import on_ranks

CUDA = torch.device("cuda", 0)
GOOD: dict[str, Any] = {
    "device": CUDA,
    "dtype": torch.bfloat16,
    "num_ranks": 4,
    "row_size": 4096,
    "num_chosen": 8,
}


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"device": torch.device("cpu")}, "it runs on cuda, not on cpu"),
        ({}, "the package deep_ep is not installed; build it as https://github"),
    ],
)
def test_what_this_machine_lacks(changed: dict[str, Any], why: str) -> None:
    assert why in str(deepep.why_not(**GOOD | changed))


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({}, "None"),
        ({"num_ranks": 3}, "2, 4 or 8 ranks on one machine, not for 3"),
        ({"dtype": torch.float16}, "sends bfloat16, not torch.float16"),
        ({"row_size": 4088}, "a row has 4088 numbers, which 16 does not divide"),
        ({"num_chosen": 33}, "33 experts, more than 32"),
    ],
)
def test_what_it_cannot_send(
    monkeypatch: pytest.MonkeyPatch, changed: dict[str, Any], why: str
) -> None:
    # A package that is installed stands for the one that is not; nothing imports it here.
    monkeypatch.setattr(deepep, "LIBRARY", "msgspec")
    assert why in str(deepep.why_not(**GOOD | changed))


def test_ranks_tell_each_other_numbers_and_bytes() -> None:
    def tell(group: Group) -> list[Any]:
        comm = HostComm(group)
        assert (comm.Get_rank(), comm.Get_size()) == (group.rank, 3)
        return [
            comm.allgather(2**40 + group.rank),
            comm.allgather(bytearray(range(100 * group.rank))),
            comm.allgather(b"root" if group.rank == 1 else None),
        ]

    expected = [
        [2**40, 2**40 + 1, 2**40 + 2],
        [bytearray(range(100 * rank)) for rank in range(3)],
        [None, bytearray(b"root"), None],
    ]
    assert on_ranks(3, tell) == [expected] * 3


def test_a_buffer_has_room_for_both_directions() -> None:
    def room(group: Group) -> int:
        buffer: Any = deepep.open_buffer(group, row_bytes=8192, library=standin_deepep)
        return int(buffer.num_nvl_bytes)

    assert on_ranks(2, room) == [128 * 8192 * 2] * 2


def test_a_library_that_cannot_start_is_a_clear_error() -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("PCIe GPUs only have pairwise NVLink connections")

    config = SimpleNamespace(get_nvl_buffer_size_hint=lambda row_bytes, ranks: row_bytes * ranks)
    fail.get_dispatch_config = fail.get_combine_config = lambda size: config  # type: ignore[attr-defined]
    library = SimpleNamespace(Buffer=fail)

    def run(group: Group) -> None:
        with pytest.raises(ConfigError, match=r"DeepEP cannot start \(PCIe GPUs.*backend torch"):
            deepep.open_buffer(group, row_bytes=8192, library=library)
        with pytest.raises(ConfigError, match="No module named 'deep_ep'"):
            deepep.open_buffer(group, row_bytes=8192)

    on_ranks(2, run)
