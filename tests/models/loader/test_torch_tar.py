"""The tar format of PyTorch before 0.2. No PyTorch writes it any more, so the writer is here; that
it writes what is meant is checked with PyTorch's own reader, which runs pickles."""

from __future__ import annotations

import io
import pickle
import struct
import tarfile
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.models.loader.weights import iterate_weights
from tests.models.loader.test_safetensors_and_pt import Evil, files_of

TENSORS = {
    "model.a.weight": torch.arange(12, dtype=torch.float32).reshape(3, 4).t(),
    "model.b.weight": torch.ones(4, dtype=torch.float16) * 1.5,
    "model.positions": torch.arange(3),
    "model.scalar": torch.tensor(2.5),
    "model.none": torch.empty(0, 4),
}


NAMES = {torch.float32: "Float", torch.float16: "Half", torch.int64: "Long"}


class ByKey(pickle.Pickler):
    """Tensors as keys."""

    def __init__(self, file: io.BytesIO, keys: Mapping[int, int]) -> None:
        super().__init__(file, protocol=2)
        self._keys = keys

    def persistent_id(self, obj: Any) -> str | None:
        return str(self._keys[id(obj)]) if isinstance(obj, Tensor) else None


def write_tar(path: Path, saved: Any, tensors: list[Tensor]) -> None:
    storages, views = io.BytesIO(), io.BytesIO()
    pickle.dump(len(tensors), storages, protocol=2)
    pickle.dump(len(tensors), views, protocol=2)
    keys: dict[int, int] = {}
    for number, tensor in enumerate(tensors):
        kind = getattr(torch, f"{NAMES[tensor.dtype]}Storage")
        data = tensor.untyped_storage()
        pickle.dump((100 + number, "cpu", kind), storages, protocol=2)
        storages.write(struct.pack("<q", len(data) // tensor.element_size()))
        storages.write(bytes(data))
        keys[id(tensor)] = number
        pickle.dump((number, 100 + number, torch.FloatTensor), views, protocol=2)
        views.write(struct.pack("<i4x", tensor.dim()))
        numbers = (*tensor.shape, *tensor.stride(), tensor.storage_offset())
        views.write(struct.pack(f"<{len(numbers)}q", *numbers))
    pickle.dump([], storages, protocol=2)
    root = io.BytesIO()
    ByKey(root, keys).dump(saved)
    with tarfile.open(path, "w:", format=tarfile.PAX_FORMAT) as archive:
        for name, file in (("storages", storages), ("tensors", views), ("pickle", root)):
            member = tarfile.TarInfo(name)
            member.size = file.tell()
            file.seek(0)
            archive.addfile(member, file)


def read(directory: Path) -> dict[str, Tensor]:
    return dict(iterate_weights(files_of(directory, "pt"), dtype=torch.float32))


@pytest.mark.filterwarnings("ignore")
def test_tensors_are_those_that_pytorch_reads(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tar(tmp_path / "model.pt", OrderedDict(TENSORS), list(TENSORS.values()))
    loaded = read(tmp_path)
    assert "model.pt is in the tar format of PyTorch before 0.2" in caplog.text
    trusted = torch.load(tmp_path / "model.pt", weights_only=False)
    assert loaded.keys() == trusted.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(trusted[name], tensor)
        assert loaded[name].shape == tensor.shape
        assert torch.equal(loaded[name].double(), tensor.double())


def test_what_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_tar(tmp_path / "model.pt", {"a": Evil()}, [])
    with pytest.raises(WeightError, match=r"does not run code.*convert it to safetensors"):
        read(tmp_path)
    assert not (tmp_path / "evil-was-here").exists()


def test_an_archive_of_other_things_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.pt", "w:") as archive:
        archive.addfile(tarfile.TarInfo("README"))
    with pytest.raises(WeightError, match=r"model\.pt is not a whole.*no member 'storages'"):
        read(tmp_path)


def test_damage_is_refused_and_never_a_crash(tmp_path: Path) -> None:
    """Every 8th byte changed, and every 64th length: read as other numbers, or refused."""
    path = tmp_path / "model.pt"
    write_tar(path, OrderedDict(TENSORS), list(TENSORS.values()))
    whole = path.read_bytes()
    changed = [
        whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :]
        for place in range(0, len(whole), 8)
    ]
    num_refused = 0
    for content in (*changed, *(whole[:end] for end in range(512, len(whole) - 1024, 64))):
        path.write_bytes(content)
        try:
            num_found = len(read(tmp_path))
        except WeightError as error:
            num_refused += "model.pt" in str(error)
        else:
            assert num_found == len(TENSORS)
    assert num_refused > 100
