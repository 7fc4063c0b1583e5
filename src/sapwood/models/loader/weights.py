"""The entry point of the loader: all tensors of a checkpoint, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.targets import Target
from sapwood.models.loader import gguf, pt, safetensors
from sapwood.models.loader.needed import Experts, no_experts
from sapwood.models.loader.reading import Advance, Wanted, every, ignore
from sapwood.store.files import ModelFiles, detect_format

__all__ = ["detect_format", "iterate_blocks", "iterate_weights"]

_Targets = Mapping[str, Target] | None
_FORMATS = ("safetensors", "gguf", "pt")


def iterate_weights(
    files: ModelFiles,
    *,
    load_format: str = "auto",
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: _Targets = None,
    experts: Experts = no_experts,
) -> Iterator[tuple[str, Tensor]]:
    """Every wanted tensor of a checkpoint, once, as (name, tensor on the CPU).

    Names are Hugging Face's ("model.layers.0.self_attn.q_proj.weight"). Floating-point tensors of
    16 and more bits come in `dtype`; other tensors (integers, 8-bit floats) are not cast. Layers
    come one after the other, whatever their order in the files. A few tensors are read ahead
    (loader/reading.py), so that the peak of memory is the caller's model and these few.

    load_format  "auto", or the format that the files must have. "dummy" has nothing to read: see
                 `dummy.random_weights`
    advance      called with the file bytes of every tensor when it is handed out
    wanted       by the names in the checkpoint: what else there is, is not read
    targets      by the names in the checkpoint: a reader may hand out only the rows or columns that
                 a rank places
    experts      as in safetensors.iterate; of GGUF files each expert is read alone in any case
    Raises       WeightError, with file and tensor, for a shard that is missing, damaged, or without
                 a tensor that the index promises
    """
    found = _checked_format(files, load_format)
    if found == "gguf":
        return gguf.iterate(files, dtype, advance, wanted, targets)
    if found == "pt":
        return pt.iterate(files, dtype, advance, wanted, targets, experts)
    return safetensors.iterate(files, dtype, advance, wanted, targets, experts)


def iterate_blocks(
    files: ModelFiles,
    *,
    load_format: str = "auto",
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: _Targets = None,
) -> Iterator[tuple[str, Tensor | LinearPart]]:
    """Like `iterate_weights`, but quantised matrices that kernels can use come as blocks.

    Raises WeightError also if the format has no such matrices."""
    found = _checked_format(files, load_format)
    if found != "gguf":
        raise WeightError(
            f"{files.name} has {found} weights, and only GGUF files hold quantised blocks; "
            "use --quantization w4a8 or w8a8_int8, which quantise while loading"
        )
    return gguf.iterate_blocks(files, dtype, advance, wanted, targets)


def _checked_format(files: ModelFiles, load_format: str) -> str:
    wanted = files.weight_format if load_format == "auto" else load_format
    if wanted != files.weight_format or wanted not in _FORMATS:
        raise WeightError(
            f"cannot read {wanted} weights of {files.name}: its files have format "
            f"{files.weight_format!r}; use --load-format {files.weight_format} or another model"
            if files.weights
            else f"{files.name} has no weights on disk; only --load-format dummy can serve it"
        )
    missing = [str(path) for path in files.weights if not path.is_file()]
    if missing:
        raise WeightError(
            f"weight files of {files.name} are missing: {', '.join(missing)}; "
            f"download the model again"
        )
    return wanted
