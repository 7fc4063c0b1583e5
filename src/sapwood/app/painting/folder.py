"""What a diffusers folder has, read without torch and without its weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.schema.config.painting import PaintingConfig
from sapwood.schema.painting import ComponentFacts
from sapwood.store.gguf_header import read_header

MODEL_INDEX = "model_index.json"
MAX_HEADER_BYTES = 100 * 2**20
_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
_STORED = {"F64": "fp32", "F32": "fp32", "BF16": "bf16", "F16": "fp16"}
_STORED |= dict.fromkeys(("F8_E4M3", "F8_E5M2"), "bf16")
_QUANTISED = {"fp8": 1.0, "w8a16": 1.0, "w8a8_int8": 1.0, "w4a8": 0.5625}
"""Bytes per number, scales included."""
GGUF = ".gguf"


@dataclass(frozen=True, slots=True, kw_only=True)
class PaintingFolder:
    """A folder with model_index.json.

    pipeline    the class that it names
    components  those with weights, each in the precision that the configuration gives it
    """

    path: Path
    pipeline: str
    components: tuple[ComponentFacts, ...]

    @property
    def num_bytes(self) -> int:
        """Of the weights in memory."""
        return sum(component.num_bytes for component in self.components)

    def precision(self, kind: str, index: int = 0) -> str:
        """Of the components of one kind ("dit", "text", "vae"), in the order of model_index.json;
        the last one's for those that follow; fp32 if there are none."""
        found = [each.precision for each in self.components if kind_of(each.name) == kind]
        return found[min(index, len(found) - 1)] if found else "fp32"


def is_painting_folder(model: str) -> bool:
    return (Path(model) / MODEL_INDEX).is_file()


def read_folder(path: Path, config: PaintingConfig) -> PaintingFolder:
    """Raises ModelSourceError if the folder's index or a weight file cannot be read."""
    index = _read_index(path)
    components: list[ComponentFacts] = []
    num_texts = 0
    for name, value in index.items():
        if not isinstance(value, list) or len(value) != 2 or not all(value):
            continue
        kind = kind_of(name)
        files = _files(path / name)
        if kind == "dit" and config.dit_path is not None and name in ("transformer", "unet"):
            files = [_dit_file(config.dit_path)]
        numbers, stored = _weights(files)
        if not numbers:
            continue
        asked = _asked(kind, num_texts, config)
        num_texts += kind == "text"
        precision = stored if asked == "auto" else asked
        components.append(
            ComponentFacts(
                name=name,
                class_name=str(value[1]),
                precision=precision,
                file_bytes=sum(file.stat().st_size for file in files),
                num_bytes=_num_bytes(kind, numbers, precision, files, config),
            )
        )
    return PaintingFolder(
        path=path, pipeline=str(index.get("_class_name", "")), components=tuple(components)
    )


def kind_of(name: str) -> str:
    """ "text", "vae" or "dit": which of the precision options is a component's."""
    if name.startswith(("text_encoder", "image_encoder")):
        return "text"
    return "vae" if name.startswith("vae") else "dit"


def _asked(kind: str, index: int, config: PaintingConfig) -> str:
    if kind == "text":
        given = config.text_precisions
        return given[min(index, len(given) - 1)]
    return config.vae_precision if kind == "vae" else config.dit_precision


def _read_index(path: Path) -> Mapping[str, Any]:
    try:
        index = json.loads((path / MODEL_INDEX).read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSourceError(f"{path / MODEL_INDEX} cannot be read: {error}") from error
    if not isinstance(index, dict):
        raise ModelSourceError(f"{path / MODEL_INDEX} must hold a JSON object")
    return index


def _files(folder: Path) -> list[Path]:
    """The weight files; where a precision is stored besides (model.fp16.safetensors), not those."""
    files = sorted(folder.glob("*.safetensors"))
    plain = [file for file in files if file.name.count(".") == 1]
    return plain or files


def _dit_file(path: str) -> Path:
    file = Path(path)
    if file.suffix not in (".safetensors", GGUF) or not file.is_file():
        raise ModelSourceError(
            f"--dit-path is {path[:300]}, but must be a safetensors or GGUF file that is there"
        )
    return file


def _num_bytes(
    kind: str, numbers: int, precision: str, files: list[Path], config: PaintingConfig
) -> int:
    """Of a component in memory; norms and biases are counted as if they were quantised, too."""
    if kind == "dit" and config.dit_quantization != "none":
        return int(numbers * _QUANTISED[config.dit_quantization])
    if files[0].suffix == GGUF:
        return sum(file.stat().st_size for file in files)
    return numbers * _BYTES[precision]


def _weights(files: list[Path]) -> tuple[int, str]:
    """(numbers, the precision that most of them are stored in)"""
    by_type: dict[str, int] = {}
    for file in files:
        for dtype, count in _gguf_tensors(file) if file.suffix == GGUF else _tensors(file):
            by_type[dtype] = by_type.get(dtype, 0) + count
    if not by_type:
        return 0, "fp32"
    most = max(by_type, key=lambda dtype: by_type[dtype])
    return sum(by_type.values()), _STORED.get(most, "fp32")


def _gguf_tensors(file: Path) -> Iterator[tuple[str, int]]:
    for entry in read_header(file).tensors:
        yield entry.type, math.prod(entry.shape)


def _tensors(file: Path) -> Iterator[tuple[str, int]]:
    """(data type, numbers) of each tensor in a safetensors file, out of its header."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > MAX_HEADER_BYTES:
                raise ValueError(f"its header has {length} bytes")
            header = json.loads(opened.read(length))
        for name, tensor in header.items():
            if name != "__metadata__":
                yield str(tensor["dtype"]), math.prod(tensor["shape"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelSourceError(f"{file} is no safetensors file: {error}") from error
