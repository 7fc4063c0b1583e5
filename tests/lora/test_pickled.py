"""Pickles of tensors: what torch writes is read, and nothing else is done."""

from __future__ import annotations

import io
import pickle
import struct
from multiprocessing.reduction import ForkingPickler
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.lora import pickled
from sapwood.lora.pickled import read_pickle


def table() -> dict[str, Tensor]:
    whole = torch.randn(6, 4)
    return {
        "a": whole,
        "a view": whole[2:4, 1:3],
        "turned": whole.t(),
        "half": torch.randn(3).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "double": torch.randn(2, dtype=torch.float64),
        "a parameter": torch.nn.Parameter(torch.randn(2)),
        "none": torch.empty(0, 3),
        "one": torch.tensor(3.0),
    }


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_what_torch_writes(protocol: int) -> None:
    expected = table()
    found = read_pickle(pickle.dumps(expected, protocol=protocol), "it")
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


class _Call:
    def __init__(self, called: Any, *arguments: Any) -> None:
        self._reduced = called, arguments

    def __reduce__(self) -> Any:
        return self._reduced


def _forked() -> bytes:
    out = io.BytesIO()
    ForkingPickler(out).dump({"a": torch.ones(2)})
    return out.getvalue()


def _huge() -> bytes:
    """One number, seen as a tensor of a million times a million."""
    from torch._utils import _rebuild_tensor_v2

    storage = torch.ones(1).storage()
    shape = (10**6, 10**6)
    return pickle.dumps({"a": _Call(_rebuild_tensor_v2, storage, 0, shape, (0, 0), False, {})})


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    ("data", "message"),
    [
        (lambda: pickle.dumps({"a": _Call(eval, "1")}), "it calls builtins.eval"),
        (lambda: pickle.dumps(_Call(torch.load, "x")), "it calls torch.serialization.load"),
        (_forked, "handles to the memory of another process"),
        (_huge, "has only 1 numbers"),
        (lambda: pickle.dumps([torch.ones(2)]), "a dict of tensors by name"),
        (lambda: pickle.dumps({"a": 1}), "a dict of tensors by name"),
        (lambda: pickle.dumps({"a": torch.ones(2).int()}), "which are no floats"),
        (lambda: pickle.dumps({"a": 1.5}), "the operation BINFLOAT"),
        (lambda: pickle.dumps({"a": bytearray(2)}), "BYTEARRAY8|it calls"),
        (
            lambda: b"\x80\x04c__builtin__\neval\n(X\x01\x00\x00\x001tR.",
            "it calls __builtin__.eval",
        ),
        (lambda: b"\x80\x04\x96" + struct.pack("<Q", 2**40), "damaged|BYTEARRAY8"),
        (lambda: b"\x80\x04R.", "more values than there are"),
        (lambda: b"\x80\x04h\x07.", "damaged"),
        (lambda: b"", "damaged"),
        (lambda: b"no pickle", "damaged|the operation"),
        (lambda: pickle.dumps({"a": torch.ones(9)})[:-30], "damaged|cannot be read"),
    ],
)
def test_anything_else_is_refused(data: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_pickle(data(), "it")


def test_operations_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pickled, "MAX_OPERATIONS", 50)
    with pytest.raises(ConfigError, match="over 50 operations"):
        read_pickle(pickle.dumps({str(n): n for n in range(100)}), "it")


def test_damaged_bytes_are_refused_without_another_error() -> None:
    data = pickle.dumps({"a": torch.randn(3, 2)})
    generator = torch.Generator().manual_seed(1)
    for _ in range(300):
        at = int(torch.randint(len(data), (1,), generator=generator))
        value = int(torch.randint(256, (1,), generator=generator))
        changed = data[:at] + bytes([value]) + data[at + 1 :]
        try:
            found = read_pickle(changed, "it")
        except ConfigError:
            continue
        assert all(isinstance(tensor, Tensor) for tensor in found.values())


def nested(wrap: bytes) -> bytes:
    """A pickle of 100 tuples, each of which has the one before twice: 2^100 leaves for whoever
    hashes or prints the last one. `wrap` is done with it."""
    doubled = b"".join(b"q%ch%c\x86" % (level, level) for level in range(100))
    return b"\x80\x04)" + doubled + wrap + b"."


@pytest.mark.parametrize(
    "wrap",
    [
        b"q\xfa0}h\xfaNs",  # the key of a dict
        b"q\xfa0}(h\xfaNu",  # likewise, set with others
        b"q\xfa0h\xfah\xfa\x93",  # the name of something to be imported
        b"q\xfa0h\xfah\xfaR",  # a call
        b"Q",  # a storage
    ],
)
def test_tuples_that_hold_themselves_twice_over_cost_nothing(wrap: bytes) -> None:
    with pytest.raises(ConfigError, match="cannot be read"):
        read_pickle(nested(wrap), "it")


def many_calls(storage: bytes, count: int, sizes: tuple[int, ...]) -> bytes:
    """A pickle in which so many calls make a storage of the same bytes, each in 40 bytes."""

    def text(value: str) -> bytes:
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    def number(value: int) -> bytes:
        return b"J" + struct.pack("<i", value)

    shape = b"(" + b"".join(map(number, sizes)) + b"t"
    stride = b"(" + b"".join(number(1) for _ in sizes) + b"t"
    rest = number(0) + shape + stride + b"\x89NtR"
    data = b"B" + struct.pack("<I", len(storage)) + storage + b"q\x00"
    first = b"ctorch._utils\n_rebuild_tensor_v2\nq\x02(ctorch.storage\n_load_from_bytes\nq\x01"
    items = [text("t0") + first + data + b"\x85R" + rest]
    items += [text(f"t{i}") + b"h\x02(h\x01h\x00\x85R" + rest for i in range(1, count)]
    return b"\x80\x04}(" + b"".join(items) + b"u."


def storage_bytes(tensor: Tensor) -> bytes:
    """The bytes of the tensor's storage, as its pickle has them."""
    called, arguments = tensor.storage().__reduce__()  # type: ignore[no-untyped-call]
    assert called.__name__ == "_load_from_bytes"
    found: bytes = arguments[0]
    return found


def test_the_same_bytes_become_one_storage() -> None:
    """Review 2, number 5: 10 MB became 3 GB, by 300 calls of 37 bytes."""
    storage = storage_bytes(torch.arange(50_000.0))
    found = read_pickle(many_calls(storage, 300, (1,)), "it")
    assert len(found) == 300
    assert len({tensor.untyped_storage().data_ptr() for tensor in found.values()}) == 1
    with pytest.raises(ConfigError, match="share one storage"):
        read_pickle(many_calls(storage, 300, (50_000,)), "it")
