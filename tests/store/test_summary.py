from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sapwood.base.errors import WeightError
from sapwood.schema.weight_summary import WeightSummary
from sapwood.store.files import ModelFiles
from sapwood.store.summary import summarize


def files(path: Path, weight_format: str, *names: str) -> ModelFiles:
    weights = tuple(path / name for name in names)
    return ModelFiles(name="m", path=path, weights=weights, weight_format=weight_format)


def test_shards_are_added_up(tmp_path):
    half, whole = torch.zeros(8, 4, dtype=torch.bfloat16), torch.zeros(4)
    save_file({"a": half, "b": whole}, tmp_path / "1.safetensors")
    save_file({"c": half}, tmp_path / "2.safetensors")
    told = summarize(files(tmp_path, "safetensors", "1.safetensors", "2.safetensors"))
    size = sum(one.stat().st_size for one in tmp_path.iterdir())
    assert told == WeightSummary(
        weight_format="safetensors", num_bytes=size, num_parameters=68, type_name="BF16"
    )


def test_packed_numbers_are_not_counted(tmp_path):
    packed = {"a": torch.zeros(64, dtype=torch.int32), "scale": torch.zeros(2)}
    save_file(packed, tmp_path / "1.safetensors")
    told = summarize(files(tmp_path, "safetensors", "1.safetensors"))
    assert (told.num_parameters, told.type_name) == (None, None)


def test_a_gguf_tells_the_type_of_most_bytes(tmp_path):
    (tmp_path / "w.gguf").write_bytes(b"x" * 700)
    tensors = [
        {"name": "a", "type": "Q4_1", "shape": [32, 32], "num_bytes": 640},
        {"name": "b", "type": "F32", "shape": [15], "num_bytes": 60},
    ]
    (tmp_path / "tensors.json").write_text(json.dumps({"tensors": tensors}))
    assert summarize(files(tmp_path, "gguf", "w.gguf")) == WeightSummary(
        weight_format="gguf", num_bytes=700, num_parameters=1039, type_name="Q4_1"
    )


def test_formats_without_shapes_have_a_size(tmp_path):
    (tmp_path / "w.bin").write_bytes(b"x" * 10)
    assert summarize(files(tmp_path, "pt", "w.bin")) == WeightSummary(
        weight_format="pt", num_bytes=10
    )
    assert summarize(files(tmp_path, "none")) == WeightSummary()


def test_a_damaged_header_is_named(tmp_path):
    (tmp_path / "w.safetensors").write_bytes(b"x" * 100)
    with pytest.raises(WeightError, match=r"w\.safetensors"):
        summarize(files(tmp_path, "safetensors", "w.safetensors"))
