from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sapwood.base.errors import ConfigError
from sapwood.convert.writer import ShardWriter, copy_side_files, new_directory


def test_shards_hold_at_most_their_size_and_an_index_names_them(tmp_path: Path) -> None:
    tensors = {f"t{index}": torch.full((100,), float(index)) for index in range(5)}
    tensors["large"] = torch.zeros(1000)
    writer = ShardWriter(tmp_path, max_bytes=1000)
    for name, tensor in tensors.items():
        writer.add(name, tensor)
    writer.finish()
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert files == [f"model-{number:05d}-of-00004.safetensors" for number in range(1, 5)]
    assert index["metadata"]["total_size"] == writer.num_bytes == 6000
    for name, tensor in tensors.items():
        assert torch.equal(load_file(tmp_path / index["weight_map"][name])[name], tensor)


def test_one_shard_needs_no_index(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=10**6)
    shared = torch.arange(6.0)
    writer.add("a", shared.view(2, 3).t())
    writer.add("b", shared.clone())
    writer.finish()
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], shared.view(2, 3).t())


def test_weights_may_be_read_by_whoever_may_read_other_new_files(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, max_bytes=10**6)
    writer.add("a", torch.zeros(3))
    writer.finish()
    (tmp_path / "other").touch()
    written = (tmp_path / "model.safetensors").stat().st_mode
    assert written == (tmp_path / "other").stat().st_mode


def test_a_directory_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    target = tmp_path / "models" / "out"

    def fail() -> None:
        with new_directory(target, force=False) as made:
            (made / "config.json").write_text("{}")
            raise RuntimeError("midway")

    with pytest.raises(RuntimeError, match="midway"):
        fail()
    assert list((tmp_path / "models").iterdir()) == []
    with new_directory(target, force=False) as made:
        (made / "config.json").write_text("1")
        assert not target.exists()
    assert (target / "config.json").read_text() == "1"
    assert list((tmp_path / "models").iterdir()) == [target]


def test_a_model_is_replaced_only_by_force_and_only_when_the_new_one_is_there(
    tmp_path: Path,
) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "config.json").write_text("old")
    (target / "more").write_text("old")
    with (
        pytest.raises(ConfigError, match="replace it with --force"),
        new_directory(target, force=False),
    ):
        pass
    with pytest.raises(RuntimeError), new_directory(target, force=True):
        raise RuntimeError
    assert (target / "config.json").read_text() == "old"
    with new_directory(target, force=True) as made:
        (made / "config.json").write_text("new")
    assert {path.name: path.read_text() for path in target.iterdir()} == {"config.json": "new"}
    assert list(tmp_path.iterdir()) == [target]


def test_force_removes_nothing_but_models(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("")
    with pytest.raises(ConfigError, match="no model"), new_directory(tmp_path, force=True):
        pass
    assert (tmp_path / "precious").exists()


def test_tokenizer_and_templates_come_along_and_weights_do_not(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    (source / "additional_chat_templates").mkdir(parents=True)
    target.mkdir()
    wanted = ["tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]
    for name in [*wanted, "tensors.json", "model.safetensors", "config.json"]:
        (source / name).write_text(name)
    copy_side_files(source, target)
    files = [path for path in target.rglob("*") if path.is_file()]
    assert sorted(str(path.relative_to(target)) for path in files) == sorted(wanted)
