from __future__ import annotations

import json
import zipfile
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Slice, Target
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.safetensors import DTYPES
from sapwood.models.loader.weights import detect_format, iterate_weights
from sapwood.store import ModelFiles
from sapwood.store.files import find_weights

FIRST = {"model.a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4)}
SECOND = {
    "model.b.weight": torch.ones(4, dtype=torch.bfloat16) * 1.5,
    "model.positions": torch.arange(3),
    "model.scaled": torch.ones(2).to(torch.float8_e4m3fn),
}
EXPECTED_DTYPES = {
    "model.a.weight": torch.float16,
    "model.b.weight": torch.float16,
    "model.positions": torch.int64,
    "model.scaled": torch.float8_e4m3fn,
}
SAVE = {"safetensors": save_file, "pt": torch.save}
SUFFIX = {"safetensors": "model-{}.safetensors", "pt": "pytorch_model-{}.bin"}
INDEX = {"safetensors": "model.safetensors.index.json", "pt": "pytorch_model.bin.index.json"}


def files_of(directory: Path, weight_format: str) -> ModelFiles:
    return ModelFiles(
        name="tiny",
        path=directory,
        weights=find_weights(directory, weight_format),
        weight_format=weight_format,
    )


@pytest.fixture(params=["safetensors", "pt"])
def sharded(request, tmp_path) -> ModelFiles:
    kind = request.param
    names = [SUFFIX[kind].format(number) for number in (1, 2)]
    for name, tensors in zip(names, (FIRST, SECOND), strict=True):
        SAVE[kind](tensors, tmp_path / name)
    table = {**dict.fromkeys(FIRST, names[0]), **dict.fromkeys(SECOND, names[1])}
    (tmp_path / INDEX[kind]).write_text(json.dumps({"weight_map": table}))
    return files_of(tmp_path, kind)


def test_all_tensors_of_all_shards_come_once_in_the_dtype(sharded):
    pairs = list(iterate_weights(sharded, dtype=torch.float16))
    loaded = dict(pairs)
    assert len(pairs) == len(loaded)
    assert {name: tensor.dtype for name, tensor in loaded.items()} == EXPECTED_DTYPES
    for name, tensor in {**FIRST, **SECOND}.items():
        assert torch.equal(loaded[name].to(torch.float32), tensor.to(torch.float32))


def test_a_shard_that_vanished_is_named(sharded):
    sharded.weights[1].unlink()
    with pytest.raises(WeightError, match=sharded.weights[1].name):
        iterate_weights(sharded, dtype=torch.float32)


def test_a_shard_that_lacks_a_tensor_of_the_index_is_named(sharded):
    SAVE[sharded.weight_format]({"other": torch.ones(1)}, sharded.weights[1])
    with pytest.raises(WeightError, match=r"lacks 3 tensors .* first model\.b\.weight"):
        list(iterate_weights(sharded, dtype=torch.float32))


def test_a_damaged_shard_is_named(sharded):
    sharded.weights[0].write_bytes(sharded.weights[0].read_bytes()[:100])
    with pytest.raises(WeightError, match=sharded.weights[0].name):
        list(iterate_weights(sharded, dtype=torch.float32))


def test_a_single_file_needs_no_index(tmp_path):
    save_file(FIRST, tmp_path / "model.safetensors")
    loaded = dict(iterate_weights(files_of(tmp_path, "safetensors"), dtype=torch.float32))
    assert torch.equal(loaded["model.a.weight"], FIRST["model.a.weight"])


def test_a_file_given_alone_is_read_alone_whatever_the_index_says(sharded):
    alone = ModelFiles(
        name="tiny",
        path=sharded.path,
        weights=sharded.weights[:1],
        weight_format=sharded.weight_format,
    )
    assert [name for name, _ in iterate_weights(alone, dtype=torch.float32)] == list(FIRST)


def test_a_pt_archive_is_read_where_its_tensors_lie(tmp_path):
    base = torch.arange(24.0).reshape(4, 6)
    tensors = {"whole": base, "rows": base[1:3], "turned": base.t(), "empty": torch.empty(0, 4)}
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    loaded = dict(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))
    assert all(torch.equal(loaded[name], tensor) for name, tensor in tensors.items())


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
@pytest.mark.parametrize("dim", [0, 1])
def test_a_rank_reads_only_its_part(tmp_path, kind, dim):
    whole = torch.arange(48.0).reshape(6, 8)
    SAVE[kind]({"w": whole}, tmp_path / SUFFIX[kind].format(1))
    part = Slice(dim=dim, first=2, size=2)
    num_bytes = []
    loaded = dict(
        iterate_weights(
            files_of(tmp_path, kind),
            dtype=torch.float32,
            advance=num_bytes.append,
            targets={"w": Target((6, 8), lambda _: None, part=part)},
        )
    )
    assert torch.equal(loaded["w"], part.of(whole))
    assert num_bytes == [whole.nbytes // whole.shape[dim] * 2]


def test_a_pt_archive_whose_storage_is_too_short_is_refused(tmp_path):
    path = tmp_path / "pytorch_model.bin"
    torch.save({"a": torch.ones(4)}, path)
    shorter = tmp_path / "shorter.bin"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(shorter, "w") as new:
        for member in old.infolist():
            data = old.read(member)
            new.writestr(member.filename, data[:8] if "/data/" in member.filename else data)
    shorter.replace(path)
    with pytest.raises(WeightError, match="not a whole PyTorch checkpoint"):
        list(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))


class Evil:
    def __reduce__(self):
        return Path.touch, (Path("evil-was-here"),)


def test_a_pickle_that_would_run_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": torch.ones(1), "b": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(WeightError, match=r"does not run code.*convert it to safetensors"):
        list(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))
    assert not (tmp_path / "evil-was-here").exists()


@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_tensors_below_a_key_are_found(tmp_path, key):
    torch.save({key: FIRST, "step": 3}, tmp_path / "model.pt")
    loaded = dict(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))
    assert torch.equal(loaded["model.a.weight"], FIRST["model.a.weight"])


def test_a_checkpoint_of_other_things_is_refused(tmp_path):
    torch.save({"step": 3, "a": torch.ones(1)}, tmp_path / "model.pt")
    with pytest.raises(WeightError, match=r"not a table of tensors \(it has: step\)"):
        list(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))


def test_checkpoints_from_before_the_zip_format_are_read_with_a_warning(tmp_path, caplog):
    torch.save(FIRST, tmp_path / "model.pt", _use_new_zipfile_serialization=False)
    loaded = dict(iterate_weights(files_of(tmp_path, "pt"), dtype=torch.float32))
    assert torch.equal(loaded["model.a.weight"], FIRST["model.a.weight"])
    assert "model.pt is in the legacy format of PyTorch before 1.6" in caplog.text


def test_every_data_type_is_read_as_the_library_reads_it(tmp_path):
    tensors = {
        name: torch.zeros(3, dtype=dtype) if dtype.is_complex else torch.ones(3).to(dtype)
        for name, dtype in DTYPES.items()
        if dtype != torch.float8_e8m0fnu
    }
    tensors["empty"] = torch.empty(0, 4)
    save_file(tensors, tmp_path / "model.safetensors")
    loaded = dict(iterate_weights(files_of(tmp_path, "safetensors"), dtype=torch.float32))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].float(), tensor.float()), name


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({f"layers.{i}.w": torch.ones(1 << 20) for i in range(12)}, path)
    weights = iterate_weights(files_of(tmp_path, "safetensors"), dtype=torch.float32)
    next(weights)
    with path.open("r+b") as file:
        file.truncate(1 << 20)
    with pytest.raises(WeightError, match=r"model\.safetensors ends before byte \d+, up to which"):
        list(weights)


def test_a_format_that_the_files_do_not_have_is_refused(sharded):
    other = "gguf"
    with pytest.raises(WeightError, match=f"cannot read {other} weights of tiny"):
        iterate_weights(sharded, load_format=other, dtype=torch.float32)
    nothing = ModelFiles(name="tiny", path=sharded.path, weights=(), weight_format="none")
    with pytest.raises(WeightError, match="only --load-format dummy"):
        iterate_weights(nothing, dtype=torch.float32)


def test_the_format_is_detected(sharded):
    assert detect_format(sharded.path) == sharded.weight_format


def test_only_the_rows_and_columns_that_a_rank_places_are_read(tmp_path):
    whole = {
        "rows": torch.arange(24.0).view(6, 4),
        "columns": torch.arange(12.0).view(2, 6),
        "all": torch.ones(3),
    }
    save_file(whole, tmp_path / "model.safetensors")
    placed: dict[str, torch.Tensor] = {}
    parts = {"rows": Slice(dim=0, first=2, size=3), "columns": Slice(dim=1, first=3, size=3)}
    model = Mock(ignorable_tensors=list)
    model.targets.return_value = {
        name: Target(tuple(tensor.shape), partial(placed.__setitem__, name), part=parts.get(name))
        for name, tensor in whole.items()
    }
    read: list[int] = []
    weights = dict(
        iterate_weights(
            files_of(tmp_path, "safetensors"),
            dtype=torch.float32,
            advance=read.append,
            targets=model.targets(),
        )
    )
    assert weights["rows"].shape == (3, 4)
    assert weights["columns"].shape == (2, 3)
    assert sum(read) == 4 * (12 + 6 + 3)
    load_weights(model, weights.items())
    assert torch.equal(placed["rows"], whole["rows"][2:5])
    assert torch.equal(placed["columns"], whole["columns"][:, 3:])
    assert torch.equal(placed["all"], whole["all"])
