"""The header's reader beside the format's own library; damaged ones are in app/test_corrupted."""

from __future__ import annotations

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from sapwood.store.safetensors_header import read_safetensors_header

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.uint16, torch.uint32, torch.uint64),
)


def test_it_reads_what_the_library_wrote(tmp_path) -> None:
    path = tmp_path / "m.safetensors"
    tensors = {
        f"{number}.{dtype}": torch.ones(number % 3 + 1, 5, 2).to(dtype)
        for number, dtype in enumerate(DTYPES)
    }
    tensors |= {"scalar": torch.tensor(1.0), "empty": torch.zeros(0, 4)}
    save_file(tensors, path, metadata={"format": "pt", "note": "ü"})
    entries = {entry.name: entry for entry in read_safetensors_header(path)}
    assert entries.keys() == tensors.keys()
    data = path.read_bytes()
    with safe_open(path, framework="pt") as library:
        for name, entry in entries.items():
            assert list(entry.shape) == library.get_slice(name).get_shape()
            assert entry.dtype == library.get_slice(name).get_dtype()
            raw = tensors[name].reshape(-1).view(torch.uint8).numpy().tobytes()
            assert data[entry.offset : entry.offset + entry.num_bytes] == raw


def test_a_file_without_tensors_is_whole(tmp_path) -> None:
    save_file({}, tmp_path / "m.safetensors")
    assert read_safetensors_header(tmp_path / "m.safetensors") == ()
