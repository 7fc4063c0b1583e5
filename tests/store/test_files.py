from __future__ import annotations

import json
from pathlib import Path

import pytest

from sapwood.base.errors import ModelSourceError
from sapwood.store.files import (
    ModelFiles,
    choose_format,
    detect_format,
    find_weights,
    list_choices,
)


def touch(directory: Path, *names: str) -> None:
    for name in names:
        (directory / name).touch()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.safetensors", "safetensors"),
        ("M.Q4_K_M.GGUF", "gguf"),
        ("pytorch_model.bin", "pt"),
        ("consolidated.00.pth", "pt"),
        ("training_args.bin", "none"),
        ("optimizer.pt", "none"),
        ("mmproj-model-f16.gguf", "none"),
        ("adapter_model.safetensors", "none"),
        ("config.json", "none"),
    ],
)
def test_format_of_a_file_follows_from_its_name(tmp_path, name, expected):
    assert detect_format(tmp_path / name) == expected


def test_safetensors_are_preferred_to_gguf_and_gguf_to_pt(tmp_path):
    assert detect_format(tmp_path) == "none"
    for name, expected in (("a.bin", "pt"), ("a.gguf", "gguf"), ("a.safetensors", "safetensors")):
        touch(tmp_path, name)
        assert detect_format(tmp_path) == expected


def test_a_format_that_was_asked_for_is_used_or_refused(tmp_path):
    touch(tmp_path, "a.bin", "a.safetensors")
    assert choose_format(tmp_path, "pt") == "pt"
    assert choose_format(tmp_path, "dummy") == "safetensors"
    with pytest.raises(ModelSourceError, match="no gguf weights"):
        choose_format(tmp_path, "gguf")


def test_a_directory_without_weights_serves_only_dummy(tmp_path):
    assert choose_format(tmp_path, "dummy") == "none"
    with pytest.raises(ModelSourceError, match="load-format dummy"):
        choose_format(tmp_path, "auto")


def test_shards_come_in_the_order_of_the_index(tmp_path):
    index = {"weight_map": {"b": "2.safetensors", "a": "1.safetensors", "c": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    touch(tmp_path, "1.safetensors", "2.safetensors", "unlisted.safetensors")
    names = [path.name for path in find_weights(tmp_path, "safetensors")]
    assert names == ["2.safetensors", "1.safetensors"]


def test_a_missing_shard_is_named(tmp_path):
    index = {"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    touch(tmp_path, "1.safetensors")
    with pytest.raises(ModelSourceError, match=r"missing.*2\.safetensors"):
        find_weights(tmp_path, "safetensors")


def test_a_broken_index_is_named(tmp_path):
    (tmp_path / "pytorch_model.bin.index.json").write_text("{")
    with pytest.raises(ModelSourceError, match=r"pytorch_model\.bin\.index\.json"):
        find_weights(tmp_path, "pt")


def test_consolidated_weights_are_not_read_twice(tmp_path):
    touch(tmp_path, "consolidated.safetensors", "model.safetensors")
    assert [path.name for path in find_weights(tmp_path, "safetensors")] == ["model.safetensors"]


def test_one_of_several_ggufs_must_be_chosen(tmp_path):
    touch(tmp_path, "m.Q4_0.gguf", "m.Q8_0.gguf")
    with pytest.raises(ModelSourceError, match=r"m\.Q4_0\.gguf, m\.Q8_0\.gguf"):
        find_weights(tmp_path, "gguf")
    chosen = tmp_path / "m.Q8_0.gguf"
    assert find_weights(chosen, "gguf") == (chosen,)


def test_a_split_gguf_is_one_choice_and_needs_all_parts(tmp_path):
    names = [f"m-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    touch(tmp_path, *names)
    assert list_choices(names) == names[:1]
    assert [path.name for path in find_weights(tmp_path, "gguf")] == names
    (tmp_path / names[1]).unlink()
    with pytest.raises(ModelSourceError, match="m-00002-of-00003"):
        find_weights(tmp_path, "gguf")


def test_model_files_cannot_be_built_wrong(tmp_path):
    with pytest.raises(ValueError, match="unknown weight format"):
        ModelFiles(name="m", path=tmp_path, weights=(), weight_format="onnx")
    with pytest.raises(ValueError, match="0 weight files"):
        ModelFiles(name="m", path=tmp_path, weights=(), weight_format="gguf")
