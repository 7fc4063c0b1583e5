"""Weights of what draws from a file of its own: safetensors as ComfyUI has them, or GGUF.

Such a file has the names of the model's first authors, or diffusers'; a whole checkpoint has its
other parts beside it, which are left out."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.targets import Target
from sapwood.models.loader.assign import Loadable, load_weights
from sapwood.models.loader.gguf import each_tensor
from sapwood.pipelines.originals import Origin, Origins, original, origins
from sapwood.store.gguf_header import read_header
from sapwood.store.safetensors_header import read_safetensors_header

GGUF = ".gguf"
_PREFIXES = ("model.diffusion_model.", "diffusion_model.", "transformer.", "unet.")
_OTHER_PARTS = (
    *("first_stage_model.", "cond_stage_model.", "conditioner.", "text_encoders.", "vae."),
    *("model_ema.", "text_encoder.", "text_encoder_2.", "cond_stage."),
)
_SCALES = (".scale_weight", ".weight_scale")
_IDLE = (".scale_input", ".input_scale", ".comfy_quant", "scaled_fp8")
"""What a file of FP8 has besides: scales of activations, which stay as they are, and marks."""
_OTHER_KINDS = {
    ".qweight": "SVDQuant (nunchaku) or GPTQ",
    ".wscales": "SVDQuant (nunchaku)",
    ".quant_state": "bitsandbytes' 4 bits",
    ".absmax": "bitsandbytes' 4 bits",
    ".SCB": "bitsandbytes' 8 bits",
    ".weight_scale_2": "NVFP4",
}
_FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)

Part = Tensor | LinearPart


def fill_from_file(
    model: Loadable, file: Path, config: Mapping[str, Any], dtype: torch.dtype
) -> None:
    """Place all weights of a component. Raises WeightError, with the file, if they do not fit.

    config  of the component, config.json"""
    targets = model.targets()
    names = origins(targets, config)
    found = _gguf(file, dtype) if file.suffix == GGUF else _safetensors(file, dtype)
    load_weights(model, _own(found, names, targets, file), source=str(file))


def _own(
    found: Iterable[tuple[str, Part]], names: Origins, targets: Mapping[str, Target], file: Path
) -> Iterator[tuple[str, Part]]:
    """The tensors by our names, those of several layers cut apart."""
    for name, tensor in found:
        origin = original(name, names)
        own = [targets[one] for one in origin.names if one in targets]
        if len(own) < len(origin.names) or (len(own) == 1 and not origin.turns):
            # What has no place here is told, among all that is wrong, by the loader.
            yield origin.names[0], _shaped(tensor, own)
            continue
        yield from _cut(name, tensor, origin, own, file)


def _cut(
    name: str, tensor: Part, origin: Origin, own: list[Target], file: Path
) -> Iterator[tuple[str, Part]]:
    sizes = [target.shape[0] for target in own]
    if isinstance(tensor, Tensor) or origin.turns:
        plain = tensor if isinstance(tensor, Tensor) else tensor.dequantized(torch.float32)
        try:
            yield from origin.parts(plain, sizes)
        except ValueError as error:
            raise WeightError(f"{file}: {name} has {error}; is it of another model?") from error
        return
    if sum(sizes) != tensor.shape[0]:
        raise WeightError(
            f"{file}: {name} has {tensor.shape[0]} rows, but must have {sum(sizes)}; is it of "
            "another model?"
        )
    start = 0
    for one, size in zip(origin.names, sizes, strict=True):
        yield one, tensor.rows(start, size)
        start += size


def _shaped(tensor: Part, own: list[Target]) -> Part:
    """Files have some vectors as matrices of one row, and the other way round."""
    if len(own) == 1 and isinstance(tensor, Tensor) and tensor.shape != own[0].shape:
        is_same = [n for n in tensor.shape if n != 1] == [n for n in own[0].shape if n != 1]
        return tensor.reshape(own[0].shape) if is_same else tensor
    return tensor


def _gguf(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Part]]:
    header = read_header(file)
    for name, tensor in each_tensor(file, header.tensors, dtype):
        yield _without_prefix(name), tensor


def _safetensors(file: Path, dtype: torch.dtype) -> Iterator[tuple[str, Part]]:
    entries = read_safetensors_header(file)
    names = {entry.name for entry in entries}
    _refuse_other_kinds(names, file)
    has_prefix = any(name.startswith(_PREFIXES[0]) for name in names)
    try:
        with safe_open(file, framework="pt") as opened:
            for entry in entries:
                name = entry.name
                is_other = name.startswith(_OTHER_PARTS) or name.endswith((*_SCALES, *_IDLE))
                if is_other or (has_prefix and not name.startswith(_PREFIXES[0])):
                    continue
                tensor = opened.get_tensor(name)
                if tensor.dtype in _FP8:
                    stem = name.removesuffix(".weight")
                    scales = [stem + end for end in _SCALES if stem + end in names]
                    scale = opened.get_tensor(scales[0]) if scales else None
                    tensor = _from_fp8(tensor, scale, file, name)
                if tensor.is_floating_point():
                    tensor = tensor.to(dtype)
                yield _without_prefix(name), tensor
    except (SafetensorError, OSError) as error:
        raise WeightError(f"{file} cannot be read: {error}") from error


def _from_fp8(tensor: Tensor, scale: Tensor | None, file: Path, name: str) -> Tensor:
    """scale: of the whole tensor, or of each row"""
    if scale is None:
        return tensor.float()
    if scale.numel() not in (1, tensor.shape[0]):
        raise WeightError(
            f"{file}: {name} has {scale.numel()} scales, but one for all of it or one for each of "
            f"its {tensor.shape[0]} rows is what sapwood reads"
        )
    return tensor.float() * scale.float().reshape(-1, *(1,) * (tensor.ndim - 1))


def _refuse_other_kinds(names: Iterable[str], file: Path) -> None:
    for name in names:
        for end, kind in _OTHER_KINDS.items():
            if name.endswith(end) or f"{end}." in name:
                raise WeightError(
                    f"{file} has {name}: weights of {kind} are not read; take the file in bf16, "
                    "FP8 or GGUF"
                )


def _without_prefix(name: str) -> str:
    return next((name[len(p) :] for p in _PREFIXES if name.startswith(p)), name)
