"""Five hundred broken checkpoints: each is refused with its reason, or only checksums can tell."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sapwood.app.building.loaded_models import load_model
from sapwood.app.building.model_defaults import sampling_defaults
from sapwood.app.building.resolving import resolve_config
from sapwood.base.errors import IntegrityError, StartupError
from sapwood.models.loader.weights import iterate_weights
from sapwood.schema.config.engine import EngineConfig
from sapwood.store import Silent, open_store
from sapwood.store.integrity import checksums_of, names_below
from sapwood.store.manifest import write_manifest
from sapwood.text.tokenizer import Tokenizer
from tests.app import corruption
from tests.app.corruption import Corrupt, Corruption, draws
from tests.tiny import llama_config, write_tokenizer

LIMIT_S = 2.0
"""CPU time of one refusal."""
SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "max_position_embeddings": 64,
}
Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Waking a pool of threads would take longer than these models do."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(3)
    layer = {
        "input_layernorm": (32,),
        "post_attention_layernorm": (32,),
        "self_attn.q_proj": (32, 32),
        "self_attn.k_proj": (32, 32),
        "self_attn.v_proj": (32, 32),
        "self_attn.o_proj": (32, 32),
        "mlp.gate_proj": (48, 32),
        "mlp.up_proj": (48, 32),
        "mlp.down_proj": (32, 48),
    }
    shapes = {f"model.layers.0.{name}.weight": shape for name, shape in layer.items()}
    shapes |= {"model.embed_tokens.weight": (260, 32), "model.norm.weight": (32,)}
    shapes |= {"lm_head.weight": (260, 32)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@dataclass
class Model:
    """A whole model; `given` is what a user would name. `contents` are its files, by name."""

    directory: Path
    given: Path
    contents: dict[str, bytes] = field(init=False)
    weights: Tensors = field(init=False)
    manifest: Path = field(init=False)

    def __post_init__(self) -> None:
        self.contents = {
            name: (self.directory / name).read_bytes() for name in names_below(self.directory)
        }
        self.manifest = self.directory.parent / f"{self.directory.name}.json"
        names = names_below(self.directory)
        write_manifest(self.manifest, checksums_of(self.directory, names, Silent()))
        self.weights = load(self.given, self.directory.parent / "home")


def load(model: Path, home: Path) -> Tensors:
    """All that a server reads before it serves; the checkpoint's tensors."""
    asked = EngineConfig.of(
        {
            "model": str(model),
            "max_total_tokens": 64,
            "device": "cpu",
            "dtype": "float32",
            "num_threads": 1,
        }
    )
    resolved = resolve_config(asked, home=home)
    load_model(resolved)
    Tokenizer.from_directory(resolved.files.path)
    sampling_defaults(resolved.files.path)
    return dict(iterate_weights(resolved.files, dtype=torch.float32))


def write_config(directory: Path) -> None:
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(llama_config(**SIZES)))
    generation = {"eos_token_id": [257], "temperature": 0.7, "top_p": 0.9}
    (directory / "generation_config.json").write_text(json.dumps(generation))
    write_tokenizer(directory)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("whole")
    made = {}
    for kind in ("safetensors", "sharded", "pt", "legacy"):
        write_config(root / kind)
    save_file(tensors(), root / "safetensors" / "model.safetensors", metadata={"format": "pt"})
    torch.save(tensors(), root / "pt" / "pytorch_model.bin")
    torch.save(
        tensors(), root / "legacy" / "pytorch_model.bin", _use_new_zipfile_serialization=False
    )
    names = list(tensors())
    table = {}
    for number, part in enumerate((names[:5], names[5:]), start=1):
        shard = f"model-{number:05d}-of-00002.safetensors"
        save_file({name: tensors()[name] for name in part}, root / "sharded" / shard)
        table |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 1}, "weight_map": table}
    (root / "sharded" / "model.safetensors.index.json").write_text(json.dumps(index))
    for kind in ("safetensors", "sharded", "pt", "legacy"):
        made[kind] = Model(root / kind, root / kind)
    return made


@pytest.fixture(scope="module")
def gguf_model(tmp_path_factory) -> Model:
    from tests import gguf_sample

    directory = tmp_path_factory.mktemp("gguf") / "model"
    directory.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        for name, size in {"HIDDEN": 64, "INTERMEDIATE": 96, "HEAD_DIM": 16, "LAYERS": 1}.items():
            patch.setattr(gguf_sample, name, size)
        gguf_sample.GgufSample().write(directory / "m.gguf")
    return Model(directory, directory / "m.gguf")


class Outcomes:
    """What became of corrupted copies of one model."""

    def __init__(self, model: Model, scratch: Path) -> None:
        self.model = model
        self.scratch = scratch
        self.num_refused = 0
        self.num_loaded = 0

    def try_all(self, corrupt: Corrupt, file: str, count: int) -> None:
        for case in draws(corrupt, self.model.directory / file, count, seed=6):
            self.try_one(case)

    def try_one(self, case: Corruption) -> None:
        if case.content == self.model.contents[case.file]:
            return
        number = self.num_refused + self.num_loaded
        directory = self.scratch / str(number)
        directory.mkdir()
        for name in self.model.contents:
            if name != case.file:
                os.link(self.model.directory / name, directory / name)
        if case.content is not None:
            (directory / case.file).write_bytes(case.content)
        given = directory / self.model.given.relative_to(self.model.directory)
        what = f"{case.file}: {case.what}"
        start_s = time.process_time()
        try:
            loaded = load(given, self.scratch / "home")
        except StartupError as error:
            self.num_refused += 1
            assert time.process_time() - start_s < LIMIT_S, what
            self._check_message(error.message, directory, what)
        else:
            self.num_loaded += 1
            assert not case.visible, f"{what} was not refused"
            self._check_loaded(loaded, case, what)
        self._check_verified(given, case.file, what)

    def _check_message(self, message: str, directory: Path, what: str) -> None:
        is_gone = what.endswith("gone") and str(directory) in message
        is_named = is_gone or any(name in message for name in self.model.contents)
        assert is_named, f"{what} names no file: {message}"
        assert len(message) < 4000, f"{what}: {message[:300]}"

    def _check_loaded(self, loaded: Tensors, case: Corruption, what: str) -> None:
        """Names, shapes and places are right: only numbers may differ, and few of them."""
        whole = self.model.weights
        assert {name: one.shape for name, one in loaded.items()} == {
            name: one.shape for name, one in whole.items()
        }, what
        different = [name for name in whole if not torch.equal(loaded[name], whole[name])]
        assert len(different) <= 1, f"{what}: {different} are not what they were"

    def _check_verified(self, given: Path, file: str, what: str) -> None:
        store = open_store(self.scratch / "home")
        with pytest.raises(StartupError) as caught:
            store.verify(str(given), str(self.model.manifest), progress=Silent())
        if isinstance(caught.value, IntegrityError):
            assert f"- {file}: " in caught.value.message, what
        else:  # no checksum is needed where weights, or shards that the index names, are gone
            assert file in caught.value.message or what.endswith("gone"), what


def test_a_safetensors_file(models, tmp_path) -> None:
    outcomes = Outcomes(models["safetensors"], tmp_path)
    for corrupt, count in {
        corruption.truncated: 25,
        corruption.lengthened: 3,
        corruption.safetensors_header_bit: 45,
        corruption.safetensors_data_bit: 6,
        corruption.safetensors_header_length: 9,
        corruption.safetensors_table: 50,
        corruption.safetensors_names: 9,
        corruption.safetensors_nonsense: 7,
        corruption.gone: 1,
    }.items():
        outcomes.try_all(corrupt, "model.safetensors", count)
    assert outcomes.num_refused > 120
    assert 6 <= outcomes.num_loaded < 20


def test_sharded_safetensors(models, tmp_path) -> None:
    model = models["sharded"]
    outcomes = Outcomes(model, tmp_path)
    first, second = (f"model-0000{number}-of-00002.safetensors" for number in (1, 2))
    index = "model.safetensors.index.json"
    for corrupt, file, count in (
        (corruption.gone, first, 1),
        (corruption.gone, second, 1),
        (corruption.truncated, second, 8),
        (corruption.safetensors_table, first, 15),
        (corruption.safetensors_names, second, 6),
        (corruption.index_table, index, 25),
        (corruption.json_nonsense, index, 7),
    ):
        outcomes.try_all(corrupt, file, count)
    outcomes.try_one(corruption.swapped(model.directory / first, model.directory / second))
    assert outcomes.num_loaded == 0


def test_a_gguf_file(gguf_model, tmp_path) -> None:
    outcomes = Outcomes(gguf_model, tmp_path)
    for corrupt, count in {
        corruption.truncated: 25,
        corruption.lengthened: 3,
        corruption.gguf_header_bit: 60,
        corruption.gguf_data_bit: 3,
        corruption.gguf_counts: 10,
        corruption.gguf_table: 30,
        corruption.gguf_nested: 6,
    }.items():
        outcomes.try_all(corrupt, "m.gguf", count)
    assert outcomes.num_refused > 80


def test_a_pytorch_file(models, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    outcomes = Outcomes(models["pt"], tmp_path)
    for corrupt, count in {
        corruption.truncated: 20,
        corruption.pt_structure_bit: 45,
        corruption.pt_data_bit: 4,
        corruption.pt_table: 14,
        corruption.pt_compressed: 1,
    }.items():
        outcomes.try_all(corrupt, "pytorch_model.bin", count)
    assert outcomes.num_refused > 60
    assert not (tmp_path / "evil-was-here").exists()


def test_a_pytorch_file_from_before_the_zip_format(models, tmp_path) -> None:
    outcomes = Outcomes(models["legacy"], tmp_path)
    outcomes.try_all(corruption.truncated, "pytorch_model.bin", 12)
    outcomes.try_all(corruption.legacy_bit, "pytorch_model.bin", 30)
    assert outcomes.num_refused > 20


def test_configuration_and_tokenizer(models, tmp_path) -> None:
    outcomes = Outcomes(models["safetensors"], tmp_path)
    for corrupt, file, count in (
        (corruption.gone, "config.json", 1),
        (corruption.truncated, "config.json", 5),
        (corruption.json_nonsense, "config.json", 7),
        (corruption.config_field, "config.json", 25),
        (corruption.config_detail, "config.json", 40),
        (corruption.json_bit, "config.json", 15),
        (corruption.truncated, "tokenizer.json", 5),
        (corruption.json_nonsense, "tokenizer.json", 7),
        (corruption.json_bit, "tokenizer.json", 12),
        (corruption.json_nonsense, "tokenizer_config.json", 7),
        (corruption.json_nonsense, "generation_config.json", 7),
        (corruption.config_detail, "generation_config.json", 12),
    ):
        outcomes.try_all(corrupt, file, count)
    assert outcomes.num_refused > 70
