from __future__ import annotations

import struct

import gguf
import numpy as np
import pytest

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_header import read_header
from tests.gguf_sample import GgufSample


def test_the_header_is_what_the_gguf_library_reads(tmp_path):
    sample = GgufSample(
        values={
            "general.alignment": 64,
            "a.bool": True,
            "a.float": 1.5,
            "a.floats": [0.5, 1.5],
            "a.strings": ["x", "ü"],
        }
    )
    sample.raw["blk.0.ffn_up.weight"] = (
        gguf.quantize(sample.weights()["blk.0.ffn_up.weight"], gguf.GGMLQuantizationType.Q5_1),
        gguf.GGMLQuantizationType.Q5_1,
    )
    path = sample.write(tmp_path / "m.gguf")
    header = read_header(path)
    reader = gguf.GGUFReader(path)
    expected = {
        key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")
    }
    assert dict(header.metadata) == expected
    rows = [
        (tensor.name, tensor.shape, tensor.type, tensor.offset, tensor.num_bytes)
        for tensor in header.tensors
    ]
    assert rows == [
        (
            tensor.name,
            tuple(int(size) for size in tensor.shape[::-1]),
            tensor.tensor_type.name,
            tensor.data_offset,
            tensor.n_bytes,
        )
        for tensor in reader.tensors
    ]


def test_a_truncated_file_is_named_with_the_tensor(tmp_path):
    path = GgufSample().write(tmp_path / "m.gguf")
    last = max(read_header(path).tensors, key=lambda tensor: tensor.offset)
    with path.open("r+b") as file:
        file.truncate(last.offset + last.num_bytes - 1)
    with pytest.raises(ModelSourceError, match=rf"m\.gguf is truncated: tensor {last.name} ends"):
        read_header(path)


def test_every_cut_through_the_header_is_found(tmp_path):
    whole = GgufSample().write(tmp_path / "m.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for size in (0, 3, 23, 24, 30, 100, 1000, 3000):
        path.write_bytes(whole[:size])
        with pytest.raises(ModelSourceError, match=r"cut\.gguf"):
            read_header(path)


@pytest.mark.parametrize(
    ("start", "data", "message"),
    [
        (0, b"GGML", "starts with b'GGML' instead of b'GGUF'"),
        (4, struct.pack(">I", 3), "big-endian"),
        (4, struct.pack("<I", 1), "version 1"),
        (8, struct.pack("<Q", 2**40), "its header needs|unknown type|dimensions|longer than"),
        (24, struct.pack("<Q", 2**62), "a metadata key has .* absurd"),
    ],
)
def test_a_damaged_header_is_explained(tmp_path, start, data, message):
    path = GgufSample().write(tmp_path / "m.gguf")
    with path.open("r+b") as file:
        file.seek(start)
        file.write(data)
    with pytest.raises(ModelSourceError, match=message):
        read_header(path)


def test_a_tensor_type_that_cannot_be_read_is_named(tmp_path):
    sample = GgufSample()
    sample.raw["output_norm.weight"] = (
        np.zeros(256, dtype=np.uint8).reshape(1, 256),
        gguf.GGMLQuantizationType.I8,
    )
    path = sample.write(tmp_path / "m.gguf")
    with pytest.raises(ModelSourceError, match=r"output_norm\.weight has type I8.*Q4_K"):
        read_header(path)
