"""Safetensors that somebody sends: read without a file, and without trust."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from sapwood.base.errors import WeightError
from sapwood.models.loader.safetensors import sent


def test_tensors_come_with_and_without_their_numbers() -> None:
    tensors = {"a": torch.randn(3, 5), "b": torch.arange(4).bfloat16(), "c": torch.ones(2).half()}
    data = safetensors.torch.save(tensors)
    found = dict(sent(data, "data", with_numbers=True))
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], one) for name, one in tensors.items())
    told = dict(sent(data, "data", with_numbers=False))
    assert {name: (one.shape, one.dtype) for name, one in told.items()} == {
        name: (one.shape, one.dtype) for name, one in tensors.items()
    }
    assert all(one.is_meta for one in told.values())


def file(body: bytes, **entry: Any) -> bytes:
    header = json.dumps({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | entry})
    return len(header).to_bytes(8, "little") + header.encode() + body


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\xff" * 100,
        (2).to_bytes(8, "little") + b"[]",
        file(b"123"),
        file(b"12345"),
        file(b"1234", shape=[2]),
        file(b"12", dtype="F4", shape=[4], data_offsets=[0, 2]),
        file(b"", shape=[0, 1 << 63], data_offsets=[0, 0]),
        file(b"1234", shape=[1] * 100),
    ],
)
def test_what_is_no_such_file_is_refused(data: bytes) -> None:
    with pytest.raises(WeightError, match=r"^data"):
        list(sent(data, "data", with_numbers=True))
