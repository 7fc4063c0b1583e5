"""LoRA files for models that draw, as diffusers, PEFT, kohya's trainer and ComfyUI write them.

They differ in names alone: of the component, of the layer in it, and of A and B. Source: diffusers'
conversions (loaders/lora_conversion_utils) and the files' own formats."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.lora.config import CONFIG_FILE, AdapterConfig, adapter_config, read_config
from sapwood.store.safetensors_header import read_safetensors_header

DIT = "dit"
"""The component that draws, whatever its folder is called."""
MAX_BYTES = 8 * 2**30
MAX_TENSORS = 100_000
_FILES = ("pytorch_lora_weights.safetensors", "adapter_model.safetensors")
_PAIRS = (
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_down.weight", ".lora_up.weight"),
    (".lora.down.weight", ".lora.up.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
_ALPHA = ".alpha"
_COMPONENTS = {
    "lora_unet_": DIT,
    "lora_transformer_": DIT,
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
    "base_model.model.": DIT,
    "model.diffusion_model.": DIT,
    "diffusion_model.": DIT,
    "transformer.": DIT,
    "unet.": DIT,
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "text_encoder_3.": "text_encoder_3",
}
_METADATA = "lora_adapter_metadata"
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_w1_a": "LoHa",
    "lokr_w1": "LoKr",
    "lokr_w1_a": "LoKr",
    "oft_blocks": "OFT",
    "diff": "whole differences of weights",
    "diff_b": "differences of biases",
}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PicturePair:
    """What is added to one layer: scale * B A.

    component  DIT, or a text encoder's folder
    path       of the layer in it, as the file has it
    a          [rank, in]
    b          [out, rank]
    """

    component: str
    path: str
    a: Tensor
    b: Tensor
    scale: float


def read_picture_adapter(path: str) -> list[PicturePair]:
    """The pairs of a file, or of the one file in a folder.

    Raises ConfigError, with the file, for anything that is no LoRA adapter of linear layers"""
    file = _file(Path(path))
    tensors, metadata = _read(file)
    config = _peft_config(file)
    alphas = {
        name.removesuffix(_ALPHA): _number(tensor, file, name)
        for name, tensor in tensors.items()
        if name.endswith(_ALPHA)
    }
    found: list[PicturePair] = []
    taken = {f"{name}{_ALPHA}" for name in alphas}
    for name, (first, second) in _firsts(tensors):
        stem = name.removesuffix(first)
        if stem + second not in tensors:
            raise ConfigError(f"{file} has {name} without its {second.strip('._')}")
        taken |= {name, stem + second}
        a, b = (_matrix(tensors[one], file, one) for one in (name, stem + second))
        if a.shape[0] != b.shape[1] or a.shape[0] < 1:
            raise ConfigError(f"{file}: {name} is {list(a.shape)}, but B is {list(b.shape)}")
        component, inner = _place(stem)
        alpha = alphas.get(stem)
        scale = 1.0 if alpha is None else alpha / a.shape[0]
        if alpha is None and config is not None:
            scale = config.scaling(inner, a.shape[0])
        elif alpha is None:
            scale = _told_scale(metadata, component, inner, a.shape[0], str(file))
        found.append(PicturePair(component=component, path=inner, a=a, b=b, scale=scale))
    _refuse_others(sorted(tensors.keys() - taken), file)
    if not found:
        raise ConfigError(f"{file} has no pair of LoRA's matrices (lora_A and lora_B, or down, up)")
    return found


def _file(path: Path) -> Path:
    if path.is_dir():
        known = [path / name for name in _FILES if (path / name).is_file()]
        files = known or sorted(path.glob("*.safetensors"))
        if len(files) != 1 and not known:
            raise ConfigError(
                f"{path} has {len(files)} safetensors files, but a LoRA adapter is one; give the "
                "file itself"
            )
        return files[0]
    if not path.is_file():
        raise ConfigError(f"there is no LoRA file {str(path)[:300]}; give a file or its folder")
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path} is no safetensors file; save the adapter as one")
    return path


def _read(file: Path) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    """The tensors by names without PEFT's name of the adapter, and the file's metadata."""
    try:
        entries = read_safetensors_header(file)
        if len(entries) > MAX_TENSORS or sum(one.num_bytes for one in entries) > MAX_BYTES:
            raise ConfigError(
                f"{file} has {len(entries)} tensors of {sum(one.num_bytes for one in entries)} "
                f"bytes, but a LoRA adapter may have {MAX_TENSORS} of {MAX_BYTES}"
            )
        with safe_open(file, framework="pt") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (WeightError, SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{file} cannot be read as safetensors: {error}") from error
    plain = {name.replace(".default.", "."): tensor for name, tensor in found.items()}
    if len(plain) < len(found):
        raise ConfigError(f"{file} has two adapters; save one of them alone")
    return plain, metadata


def _firsts(tensors: Mapping[str, Tensor]) -> list[tuple[str, tuple[str, str]]]:
    """(name of A, the ends of A and B) of each pair"""
    return [(name, pair) for name in tensors for pair in _PAIRS[:-1] if name.endswith(pair[0])] + [
        (name, _PAIRS[-1])
        for name in tensors
        if name.endswith(_PAIRS[-1][0]) and not name.endswith(_PAIRS[2][0])
    ]


def _place(stem: str) -> tuple[str, str]:
    """(component, path in it) of a layer"""
    component, path = DIT, stem
    # PEFT puts its beginning before diffusers'.
    for _ in range(2):
        for start, named in _COMPONENTS.items():
            if path.startswith(start):
                component, path = named, path.removeprefix(start)
                break
    if ".processor.to_" in path:  # as diffusers saved them at first
        path = path.replace(".processor.", ".")
        path = f"{path}.0" if path.endswith(".to_out") else path
    return component, path


def _matrix(tensor: Tensor, file: Path, name: str) -> Tensor:
    """[rows, columns] of a matrix, or of a convolution over single pixels"""
    if tensor.ndim == 4 and tuple(tensor.shape[2:]) == (1, 1):
        tensor = tensor.flatten(1)
    if tensor.ndim != 2 or not tensor.is_floating_point() or tensor.element_size() < 2:
        kind = "a convolution" if tensor.ndim == 4 else f"{list(tensor.shape)} {tensor.dtype}"
        raise ConfigError(f"{file}: {name} is {kind}; adapters of linear layers are served")
    return tensor


def _number(tensor: Tensor, file: Path, name: str) -> float:
    if tensor.numel() != 1 or not bool(tensor.float().isfinite()):
        raise ConfigError(f"{file}: {name} must be one finite number")
    return float(tensor.float())


def _peft_config(file: Path) -> AdapterConfig | None:
    return read_config(file.parent) if (file.parent / CONFIG_FILE).is_file() else None


def _told_scale(
    metadata: Mapping[str, str], component: str, path: str, rank: int, source: str
) -> float:
    """By the configuration that diffusers writes into the file; 1 if there is none."""
    raw = metadata.get(_METADATA)
    if raw is None:
        return 1.0
    try:
        values: Any = json.loads(raw)
        starts = ("transformer.", "unet.") if component == DIT else (f"{component}.",)
        own = {
            name.removeprefix(start): value
            for name, value in values.items()
            for start in starts
            if name.startswith(start)
        }
    except (ValueError, AttributeError, RecursionError, msgspec.ValidationError) as error:
        raise ConfigError(f"{source}: its {_METADATA} cannot be read: {error}") from error
    return adapter_config(own, source).scaling(path, rank) if own else 1.0


def _refuse_others(names: list[str], file: Path) -> None:
    if not names:
        return
    for name in names:
        kind = _OTHER_KINDS.get(name.rpartition(".")[2]) or _OTHER_KINDS.get(
            name.removesuffix(".weight").rpartition(".")[2]
        )
        if kind is not None:
            raise ConfigError(f"{file} has {name}: {kind} is not served; merge it into the model")
    raise ConfigError(
        f"{file} has {len(names)} tensors that no LoRA adapter has: {', '.join(names[:5])}"
    )
