"""What is in a folder of CTranslate2's Whisper, and the same in Hugging Face's layout.

Format: CTranslate2's `Model.serialize`, binary versions 4 to 6. A version (u32), a specification's
name and revision (u32), then per tensor its name, rank (u8), sizes (u32 each), type (u8) and bytes
(u32 before them), and pairs of names of equal tensors. A name is a length (u16) and that many
bytes, the last of which is zero.
"""

from __future__ import annotations

import json
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sapwood.base.errors import ModelSourceError

_VERSIONS = range(4, 7)
_WHISPER = "WhisperSpec"
_DTYPES = {0: "<f4", 1: "i1", 2: "<i2", 3: "<i4", 4: "<f2"}
_ACTIVATIONS = {0: "relu", 1: "gelu_new", 2: "silu", 3: "gelu"}
_MOST_TENSORS = 100_000
_MOST_DIMENSIONS = 8
_STEP_S = 0.02
"""Between two tokens that stand for times."""
_LAST_TIME = 1500
"""Steps of the last such token after the first one: 30 s."""

Array = NDArray[np.generic]


@dataclass(frozen=True, slots=True)
class Converted:
    """What a model.bin holds.

    specification  the name of the model's kind
    tensors        by CTranslate2's names; they read the file
    """

    specification: str
    tensors: Mapping[str, Array]


def read(path: Path) -> Converted:
    """Raises ModelSourceError or ValueError if the file is damaged."""
    with path.open("rb") as file:
        data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return _Reader(path, data).read()


class _Reader:
    def __init__(self, path: Path, data: memoryview) -> None:
        self._path = path
        self._data = data
        self._at = 0

    def read(self) -> Converted:
        version = self._number("<I")
        if version not in _VERSIONS:
            raise ModelSourceError(
                f"{self._path} is of CTranslate2's binary version {version}; versions "
                f"{_VERSIONS.start} to {_VERSIONS.stop - 1} are read. Convert the model again"
            )
        specification = self._name()
        self._number("<I")
        count = self._number("<I")
        if count > _MOST_TENSORS:
            raise ValueError(f"it claims {count} tensors")
        tensors = dict(self._tensor() for _ in range(count))
        return Converted(specification, tensors)

    def _tensor(self) -> tuple[str, Array]:
        name, rank = self._name(), self._number("<B")
        if rank > _MOST_DIMENSIONS:
            raise ValueError(f"{name} claims {rank} dimensions")
        shape = tuple(self._number("<I") for _ in range(rank))
        kind, num_bytes = self._number("<B"), self._number("<I")
        if kind not in _DTYPES:
            raise ValueError(f"{name} has numbers of an unknown kind, {kind}")
        dtype = np.dtype(_DTYPES[kind])
        if prod(shape) * dtype.itemsize != num_bytes:
            raise ValueError(f"{name} is {list(shape)} but has {num_bytes} bytes")
        return name, np.frombuffer(self._take(num_bytes), dtype).reshape(shape)

    def _name(self) -> str:
        return bytes(self._take(self._number("<H"))).rstrip(b"\0").decode()

    def _number(self, form: str) -> int:
        (found,) = struct.unpack(form, self._take(struct.calcsize(form)))
        return int(found)

    def _take(self, num_bytes: int) -> memoryview:
        end = self._at + num_bytes
        if end > len(self._data):
            raise ValueError("it ends early")
        taken, self._at = self._data[self._at : end], end
        return taken


def write_as_hugging_face(folder: Path, target: Path, weights: str) -> None:
    """Write the files of a folder's model into `target`; `weights` is the name of its tensors.

    Raises ModelSourceError, or what a damaged file makes of its reading"""
    from safetensors.numpy import save_file

    found = read(folder / weights)
    if found.specification != _WHISPER:
        raise ModelSourceError(
            f"{folder} is CTranslate2's form of a {found.specification}; of such folders only "
            f"Whisper's ({_WHISPER}) are read. Give the model in Hugging Face's layout or as a GGUF"
        )
    tensors = {name: np.ascontiguousarray(one) for name, one in _renamed(found.tensors).items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    tokenizer = json.loads((folder / "tokenizer.json").read_text("utf-8"))
    own = json.loads((folder / "config.json").read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    config = _config(found.tensors, ids)
    _dump(target / "config.json", config)
    _dump(target / "generation_config.json", _generation_config(own, ids, config))
    _dump(target / "tokenizer.json", _with_times(tokenizer, ids, config["vocab_size"]))


def _renamed(found: Mapping[str, Array]) -> dict[str, Array]:
    """Hugging Face's names -> tensors, float16 or float32."""
    tensors: dict[str, Array] = {
        "model.decoder.embed_tokens.weight": _floats(found, "decoder/embeddings/weight"),
    }
    for number in (1, 2):
        for part in ("weight", "bias"):
            name = f"encoder/conv{number}/{part}"
            tensors[f"model.encoder.conv{number}.{part}"] = _floats(found, name)
    for side in ("encoder", "decoder"):
        tensors[f"model.{side}.embed_positions.weight"] = _floats(
            found, f"{side}/position_encodings/encodings"
        )
        _norm(tensors, f"model.{side}.layer_norm", found, f"{side}/layer_norm")
        for index in range(_num_layers(found, side)):
            _layer(tensors, f"model.{side}.layers.{index}", found, f"{side}/layer_{index}")
    return tensors


def _layer(tensors: dict[str, Array], name: str, found: Mapping[str, Array], theirs: str) -> None:
    parts: list[tuple[str, str, tuple[tuple[str, ...], ...]]] = [
        ("self_attn", "self_attention", (("q_proj", "k_proj", "v_proj"), ("out_proj",)))
    ]
    if f"{theirs}/attention/linear_0/weight" in found:
        across = (("q_proj",), ("k_proj", "v_proj"), ("out_proj",))
        parts.append(("encoder_attn", "attention", across))
    for ours, attention, linears in parts:
        for number, together in enumerate(linears):
            _split(
                tensors, f"{name}.{ours}", together, found, f"{theirs}/{attention}/linear_{number}"
            )
        _norm(tensors, f"{name}.{ours}_layer_norm", found, f"{theirs}/{attention}/layer_norm")
    for number in (0, 1):
        _split(tensors, name, (f"fc{number + 1}",), found, f"{theirs}/ffn/linear_{number}")
    _norm(tensors, f"{name}.final_layer_norm", found, f"{theirs}/ffn/layer_norm")


def _split(
    tensors: dict[str, Array],
    prefix: str,
    parts: tuple[str, ...],
    found: Mapping[str, Array],
    theirs: str,
) -> None:
    """Rows that lie together become a tensor each. Whisper's keys have no bias: CTranslate2 keeps
    zeros there."""
    for kind in ("weight", "bias"):
        whole = _floats(found, f"{theirs}/{kind}")
        for part, rows in zip(parts, np.split(whole, len(parts)), strict=True):
            if not (kind == "bias" and part == "k_proj"):
                tensors[f"{prefix}.{part}.{kind}"] = rows


def _norm(tensors: dict[str, Array], name: str, found: Mapping[str, Array], theirs: str) -> None:
    for ours, part in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"{name}.{ours}"] = _floats(found, f"{theirs}/{part}")


def _floats(found: Mapping[str, Array], name: str) -> Array:
    values = found[name]
    if values.dtype.kind == "f":
        return values
    if values.dtype != np.int8:
        raise ValueError(f"{name} has {values.dtype} numbers, which are not read")
    # One scale per row, by which CTranslate2 has multiplied the row.
    scale = found[f"{name}_scale"].astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    return (values.astype(np.float32) / scale).astype(np.float16)


def _num_layers(found: Mapping[str, Array], side: str) -> int:
    names = {name.split("/")[1] for name in found if name.startswith(f"{side}/layer_")}
    return len(names - {"layer_norm"})


def _config(found: Mapping[str, Array], ids: Mapping[str, int]) -> dict[str, Any]:
    vocab_size, size = found["decoder/embeddings/weight"].shape
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides[f"{side}_layers"] = _num_layers(found, side)
        sides[f"{side}_attention_heads"] = int(found[f"{side}/num_heads"])
        sides[f"{side}_ffn_dim"] = found[f"{side}/layer_0/ffn/linear_0/weight"].shape[0]
    return {
        "architectures": ["WhisperForConditionalGeneration"],
        "model_type": "whisper",
        "vocab_size": vocab_size,
        "d_model": size,
        **sides,
        "num_mel_bins": found["encoder/conv1/weight"].shape[1],
        "max_source_positions": found["encoder/position_encodings/encodings"].shape[0],
        "max_target_positions": found["decoder/position_encodings/encodings"].shape[0],
        "activation_function": _ACTIVATIONS[int(found["decoder/activation"])],
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|endoftext|>"],
        "pad_token_id": ids["<|endoftext|>"],
        "decoder_start_token_id": ids["<|startoftranscript|>"],
        "torch_dtype": "float16",
    }


def _generation_config(
    own: Mapping[str, Any], ids: Mapping[str, int], config: Mapping[str, Any]
) -> dict[str, Any]:
    by_id = {token_id: token for token, token_id in ids.items()}
    languages = own.get("lang_ids") or []
    return {
        "bos_token_id": config["bos_token_id"],
        "eos_token_id": config["eos_token_id"],
        "pad_token_id": config["pad_token_id"],
        "decoder_start_token_id": config["decoder_start_token_id"],
        "no_timestamps_token_id": ids["<|notimestamps|>"],
        "is_multilingual": config["vocab_size"] >= 51865,
        "lang_to_id": {by_id[one]: one for one in languages if one in by_id},
        "task_to_id": {name: ids[f"<|{name}|>"] for name in ("transcribe", "translate")},
        "suppress_tokens": own.get("suppress_ids") or [],
        "begin_suppress_tokens": own.get("suppress_ids_begin") or [],
        "alignment_heads": own.get("alignment_heads") or [],
        "max_initial_timestamp_index": 50,
    }


def _with_times(
    tokenizer: dict[str, Any], ids: Mapping[str, int], vocab_size: int
) -> dict[str, Any]:
    """The tokens that stand for times have ids in the model, but older files leave them out."""
    first = ids["<|notimestamps|>"] + 1
    known = set(ids.values())
    for step in range(min(_LAST_TIME + 1, vocab_size - first)):
        if first + step not in known:
            tokenizer["added_tokens"].append(
                {
                    "id": first + step,
                    "content": f"<|{step * _STEP_S:.2f}|>",
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
            )
    return tokenizer


def _dump(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", "utf-8")
