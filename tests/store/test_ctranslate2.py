"""Folders of CTranslate2's Whisper become Hugging Face's, with the same numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from sapwood.base.errors import ModelSourceError
from sapwood.store.ctranslate2 import is_ctranslate2, prepare_ctranslate2
from sapwood.store.fetch import open_store
from sapwood.store.progress import Silent
from tests.hearing import save

_CODES = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}
SPECIAL = ("<|endoftext|>", "<|startoftranscript|>", "<|en|>", "<|translate|>", "<|transcribe|>")


def name_bytes(name: str) -> bytes:
    raw = name.encode() + b"\0"
    return struct.pack("<H", len(raw)) + raw


def model_bytes(
    tensors: Mapping[str, np.ndarray], *, version: int = 6, specification: str = "WhisperSpec"
) -> bytes:
    parts = [struct.pack("<I", version), name_bytes(specification), struct.pack("<I", 3)]
    parts.append(struct.pack("<I", len(tensors)))
    for name, one in tensors.items():
        parts += [name_bytes(name), struct.pack(f"<B{one.ndim}I", one.ndim, *one.shape)]
        parts += [struct.pack("<BI", _CODES[one.dtype.name], one.nbytes), one.tobytes()]
    return b"".join((*parts, struct.pack("<I", 0)))


def converted(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """What CTranslate2 makes of transformers' tiny Whisper."""
    theirs = {name: one.detach().numpy() for name, one in model.named_parameters()}
    found = {"decoder/embeddings/weight": theirs["model.decoder.embed_tokens.weight"]}
    found["decoder/activation"] = np.array(3, dtype=np.int8)

    def take(ours: str, name: str) -> None:
        for kind in ("weight", "bias"):
            found[f"{ours}/{kind}"] = theirs[f"{name}.{kind}"]

    def together(ours: str, prefix: str, names: tuple[str, ...]) -> None:
        zeros = np.zeros(48, dtype=np.float32)
        for kind in ("weight", "bias"):
            rows = [theirs.get(f"{prefix}.{name}.{kind}", zeros) for name in names]
            found[f"{ours}/{kind}"] = np.concatenate(rows)

    def norm(ours: str, name: str) -> None:
        found[f"{ours}/gamma"], found[f"{ours}/beta"] = (
            theirs[f"{name}.weight"],
            theirs[f"{name}.bias"],
        )

    for number in (1, 2):
        take(f"encoder/conv{number}", f"model.encoder.conv{number}")
    for side, count in (("encoder", 2), ("decoder", 3)):
        found[f"{side}/num_heads"] = np.array(3, dtype=np.int16)
        found[f"{side}/position_encodings/encodings"] = (
            dict(model.named_parameters())[f"model.{side}.embed_positions.weight"].detach().numpy()
        )
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        for index in range(count):
            ours, name = f"{side}/layer_{index}", f"model.{side}.layers.{index}"
            own = f"{name}.self_attn"
            together(f"{ours}/self_attention/linear_0", own, ("q_proj", "k_proj", "v_proj"))
            take(f"{ours}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{ours}/self_attention/layer_norm", f"{own}_layer_norm")
            take(f"{ours}/ffn/linear_0", f"{name}.fc1")
            take(f"{ours}/ffn/linear_1", f"{name}.fc2")
            norm(f"{ours}/ffn/layer_norm", f"{name}.final_layer_norm")
            if side == "decoder":
                other = f"{name}.encoder_attn"
                take(f"{ours}/attention/linear_0", f"{other}.q_proj")
                together(f"{ours}/attention/linear_1", other, ("k_proj", "v_proj"))
                take(f"{ours}/attention/linear_2", f"{other}.out_proj")
                norm(f"{ours}/attention/layer_norm", f"{other}_layer_norm")
    return found


Write = Callable[..., Path]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> torch.nn.Module:
    from transformers import WhisperForConditionalGeneration

    directory = save(tmp_path_factory.mktemp("whisper") / "theirs")
    return WhisperForConditionalGeneration.from_pretrained(directory, dtype=torch.float32)


@pytest.fixture
def write(tmp_path: Path, theirs: torch.nn.Module) -> Write:
    def make(**changes: object) -> Path:
        folder = tmp_path / "ct2"
        folder.mkdir(exist_ok=True)
        raw = model_bytes(converted(theirs), **changes)  # type: ignore[arg-type]
        (folder / "model.bin").write_bytes(raw)
        own = {"suppress_ids": [1, 2], "suppress_ids_begin": [3], "lang_ids": [202]}
        (folder / "config.json").write_text(json.dumps(own))
        names = (*SPECIAL, "<|notimestamps|>")
        tokens = [
            {"id": 200 + index, "content": name, "special": True}
            for index, name in enumerate(names)
        ]
        (folder / "tokenizer.json").write_text(json.dumps({"added_tokens": tokens}))
        return folder

    return make


def test_the_tensors_are_those_of_transformers(
    write: Write, theirs: torch.nn.Module, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    folder = write()
    assert is_ctranslate2(folder)
    found = open_store(tmp_path / "home").fetch(str(folder), progress=Silent())
    assert found.weight_format == "safetensors"
    tensors = load_file(found.weights[0])
    expected = dict(theirs.named_parameters())
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], one) for name, one in expected.items())
    config = json.loads((found.path / "config.json").read_text())
    own = theirs.config
    names = ("d_model", "vocab_size", "encoder_ffn_dim", "decoder_layers", "num_mel_bins")
    assert [config[name] for name in names] == [getattr(own, name) for name in names]
    generation = json.loads((found.path / "generation_config.json").read_text())
    assert generation["lang_to_id"] == {"<|en|>": 202}
    assert generation["task_to_id"] == {"transcribe": 204, "translate": 203}
    added = json.loads((found.path / "tokenizer.json").read_text())["added_tokens"]
    assert [one["content"] for one in added[6:8]] == ["<|0.00|>", "<|0.02|>"]
    assert added[-1]["id"] < own.vocab_size
    # The second time nothing is written.
    before = found.weights[0].stat().st_mtime_ns
    again = prepare_ctranslate2(folder, home=tmp_path / "home", progress=Silent())
    assert (again / "model.safetensors").stat().st_mtime_ns == before


def test_matrices_of_8_bits_become_float16(
    write: Write, theirs: torch.nn.Module, tmp_path: Path
) -> None:
    from safetensors.torch import load_file

    name = "decoder/layer_1/ffn/linear_0/weight"
    folder, tensors = write(), converted(theirs)
    weight = tensors[name]
    # As CTranslate2 does: each row is multiplied by what makes its largest number 127.
    scale = 127.0 / np.abs(weight).max(axis=1)
    tensors[name] = np.round(weight * scale[:, None]).astype(np.int8)
    tensors[f"{name}_scale"] = scale.astype(np.float32)
    (folder / "model.bin").write_bytes(model_bytes(tensors))
    found = prepare_ctranslate2(folder, home=tmp_path / "home", progress=Silent())
    read = load_file(found / "model.safetensors")["model.decoder.layers.1.fc1.weight"]
    assert read.dtype == torch.float16
    step = torch.from_numpy(1 / scale)[:, None]
    assert ((read.float() - torch.from_numpy(weight)).abs() <= 0.51 * step + 1e-3).all()


def test_what_is_not_read_is_refused(write: Write, tmp_path: Path) -> None:
    def reason() -> str:
        with pytest.raises(ModelSourceError) as caught:
            prepare_ctranslate2(folder, home=tmp_path / "home", progress=Silent())
        return caught.value.message

    folder = write(version=3)
    assert "binary version 3" in reason()
    folder = write(specification="TransformerSpec")
    assert "only Whisper's" in reason()
    folder = write()
    raw = (folder / "model.bin").read_bytes()
    for length in (5, 40, len(raw) // 2):
        (folder / "model.bin").write_bytes(raw[:length])
        assert "makes no model" in reason()
    # Sizes whose product is larger than the file, and more tensors than anybody has.
    (folder / "model.bin").write_bytes(raw.replace(struct.pack("<2I", 48, 16), b"\xff" * 8))
    assert "makes no model" in reason()
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in reason()


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not is_ctranslate2(tmp_path)
    torch.save({"weight": torch.zeros(2)}, tmp_path / "model.bin")
    assert not is_ctranslate2(tmp_path)
