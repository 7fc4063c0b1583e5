"""Tensors of PyTorch checkpoints (.bin, .pt, .pth), read without running any code in them.

Files of the zip format are mapped. The two older formats, a bare pickle stream and before that a
tar archive, cannot be mapped: they are read whole, with a warning.
"""

from __future__ import annotations

import logging
import pickle
import tarfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from sapwood.base.errors import WeightError
from sapwood.layers.targets import Target
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.loader.reading import Advance, Wanted, every, ignore
from sapwood.models.loader.torch_tar import read_tar
from sapwood.store.files import ModelFiles
from sapwood.store.torch_archive import check_archive

log = logging.getLogger(__name__)


def iterate(
    files: ModelFiles,
    dtype: torch.dtype,
    advance: Advance = ignore,
    wanted: Wanted = every,
    targets: Mapping[str, Target] | None = None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """As `weights.iterate_weights`; tensors always come whole."""
    del targets
    expected = Expected(files)
    for path in files.weights:
        tensors = _load(path)
        expected.check(path, tensors)
        for name in list(tensors):
            # Popped, so that a tensor that was copied into another dtype is freed at once.
            tensor = tensors.pop(name)
            if not wanted(name):
                continue
            advance(tensor.nbytes)
            yield name, as_dtype(tensor, dtype)


def _load(path: Path) -> dict[str, torch.Tensor]:
    is_archive = check_archive(path)
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
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=is_archive)
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


def _state(path: Path, loaded: Any) -> dict[str, torch.Tensor]:
    """The table of tensors, which some checkpoints keep under a key."""
    for key in ("state_dict", "model"):
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    strangers = (
        [name for name, value in loaded.items() if not isinstance(value, torch.Tensor)]
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


def _why_not_plain(tensor: torch.Tensor) -> str | None:
    """Why a tensor is not a plain block of numbers in memory; None if it is."""
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        return "it is no dense tensor"
    # With a stride of 0, a single number in the file could become a tensor of any size.
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        return f"its shape is {list(tensor.shape)} but less than that is stored"
    return None


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
