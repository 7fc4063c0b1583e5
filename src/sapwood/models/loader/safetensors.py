"""Tensors of safetensors files, one or many, memory-mapped."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from safetensors import SafetensorError, safe_open

from sapwood.base.errors import WeightError
from sapwood.models.loader.checkpoint import Expected, as_dtype
from sapwood.models.store.files import ModelFiles
from sapwood.models.store.safetensors_header import read_safetensors_header


def iterate(files: ModelFiles, dtype: torch.dtype | None) -> Iterator[tuple[str, torch.Tensor]]:
    """As `weights.iterate_weights`; with None, every tensor in its own dtype."""
    expected = Expected(files)
    for path in files.weights:
        read_safetensors_header(path)
        try:
            with safe_open(path, framework="pt", device="cpu") as shard:
                names = list(shard.keys())
                expected.check(path, names)
                for name in names:
                    yield name, as_dtype(shard.get_tensor(name), dtype)
        except (SafetensorError, OSError) as error:
            raise WeightError(
                f"{path} is not a whole safetensors file ({error}); download the model again"
            ) from error


def names(files: ModelFiles) -> list[str]:
    """Of all tensors, from the files' headers."""
    return [entry.name for path in files.weights for entry in read_safetensors_header(path)]
