"""Tensors of PyTorch checkpoints (.bin, .pt, .pth), read without running what is in them."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from sapwood.base.errors import WeightError
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.store.files import ModelFiles


def iterate(files: ModelFiles, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """As `weights.iterate_weights`."""
    expected = Expected(files)
    for path in files.weights:
        tensors = _load(path)
        expected.check(path, tensors)
        for name in list(tensors):
            # Popped, so that a tensor that was copied into another dtype is freed at once.
            yield name, as_dtype(tensors.pop(name), dtype)


def _load(path: Path) -> dict[str, torch.Tensor]:
    # Files from before PyTorch 1.6 are a bare pickle stream, which cannot be mapped.
    can_map = zipfile.is_zipfile(path)
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=can_map)
    except pickle.UnpicklingError as error:
        raise WeightError(
            f"{path} holds more than tensors and sapwood does not run code from a checkpoint; "
            f"convert it to safetensors. PyTorch says: {_first_line(error)}"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise WeightError(
            f"{path} is not a whole PyTorch checkpoint ({_first_line(error)}); "
            f"download the model again"
        ) from error
    return _state(path, loaded)


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
    return dict(loaded)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
