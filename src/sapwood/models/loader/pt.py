"""Tensors of PyTorch checkpoints (.bin, .pt, .pth), read without running any code in them.

Of files of the zip format a rank reads its parts. The two older formats, a bare pickle stream and
before that a tar archive, do not say where tensors lie: they are read whole, with a warning.
"""

from __future__ import annotations

import logging
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Target
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.loader.needed import Experts, no_experts
from sapwood.models.loader.plain import PlainTensor
from sapwood.models.loader.reading import (
    Advance,
    Stored,
    Wanted,
    every,
    ignore,
    read_ahead,
    read_bytes,
)
from sapwood.models.loader.torch_tar import read_tar
from sapwood.store.files import ModelFiles
from sapwood.store.torch_archive import storages_of

log = logging.getLogger(__name__)


def iterate(
    files: ModelFiles,
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: Mapping[str, Target] | None = None,
    experts: Experts = no_experts,
) -> Iterator[tuple[str, Tensor]]:
    """As `safetensors.iterate`; tensors of the older formats come whole, and first."""
    expected = Expected(files)
    stored: list[Stored[Tensor]] = []
    for path in files.weights:
        storages = storages_of(path)
        tensors = _load(path, storages is not None)
        expected.check(path, tensors)
        for name in list(tensors):
            # Popped, so that a tensor that was copied into another dtype is freed at once.
            tensor = tensors.pop(name)
            if not wanted(name):
                continue
            if storages is not None:
                stored.append(_stored(path, name, tensor, storages, dtype, targets, experts))
                continue
            advance(tensor.nbytes)
            yield name, as_dtype(tensor, dtype)
    yield from read_ahead(stored, advance=advance)


def _stored(
    path: Path,
    name: str,
    tensor: Tensor,
    storages: Mapping[int, int],
    dtype: torch.dtype,
    targets: Mapping[str, Target] | None,
    experts: Experts,
) -> Stored[Tensor]:
    """tensor: without numbers, as `_load` gives it of an archive"""
    storage = tensor.untyped_storage()
    offset = storage._checkpoint_offset
    if offset is None or storage.nbytes() > storages.get(offset, 0):
        raise _damaged(path, f"{name}: it does not lie in the {storage.nbytes()} bytes it should")
    first = offset + int(tensor.storage_offset()) * tensor.itemsize
    if tensor.is_contiguous():
        place = PlainTensor(
            name=name,
            path=path,
            dtype=tensor.dtype,
            shape=tuple(tensor.shape),
            offset=first,
            num_bytes=tensor.nbytes,
        )
        return place.stored(dtype, targets, experts(name))
    strides, shape = tensor.stride(), tensor.shape
    last = sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    span = (last + 1) * tensor.itemsize
    own = tensor.dtype

    def read() -> Tensor:
        numbers = read_bytes(path, first, span).view(own)
        return as_dtype(numbers.as_strided(shape, strides).contiguous(), dtype)

    return Stored(name=name, file_bytes=span, num_bytes=2 * span, read=read)


def _load(path: Path, is_archive: bool) -> dict[str, Tensor]:
    """The tensors by name; those of an archive without their numbers, which stay in the file."""
    is_tar = not is_archive and tarfile.is_tarfile(path)
    if not is_archive:
        log.warning(
            "%s is in the %s: it is read into memory whole; convert it to safetensors",
            path,
            "tar format of PyTorch before 0.2" if is_tar else "legacy format of PyTorch before 1.6",
        )
    try:
        if is_tar:
            # PyTorch itself reads these files only by running the code in them.
            loaded = read_tar(path)
        else:
            with FakeTensorMode() if is_archive else nullcontext():
                loaded = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "global" not in str(error).lower():
            raise _damaged(path, error) from error
        raise WeightError(
            f"{path} holds more than tensors and sapwood does not run code from a checkpoint; "
            f"convert it to safetensors. PyTorch says: {_first_line(error)}"
        ) from error
    except Exception as error:  # given garbage, an unpickler raises errors of every kind
        raise _damaged(path, error) from error
    return _state(path, loaded)


def _damaged(path: Path, error: Exception | str) -> WeightError:
    what = error if isinstance(error, str) else _first_line(error)
    return WeightError(f"{path} is not a whole PyTorch checkpoint ({what}); download it again")


def _state(path: Path, loaded: Any) -> dict[str, Tensor]:
    """The table of tensors, which some checkpoints keep under a key."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    strangers = (
        [name for name, value in loaded.items() if not isinstance(value, Tensor)]
        if isinstance(loaded, dict)
        else [type(loaded).__name__]
    )
    if strangers:
        raise WeightError(
            f"{path} is not a table of tensors (it has: {', '.join(map(str, strangers[:3]))}); "
            f"save the model's state_dict() alone"
        )
    for name, tensor in loaded.items():
        why = "its name is no text" if not isinstance(name, str) else _why_not_plain(tensor)
        if why is not None:
            raise _damaged(path, f"{name}: {why}")
    return dict(loaded)


def _why_not_plain(tensor: Tensor) -> str | None:
    """Why a tensor is not a plain block of numbers in memory; None if it is."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "it is no dense tensor"
    # With a stride of 0, a single number in the file could become a tensor of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"its shape is {list(tensor.shape)} but less than that is stored"
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
