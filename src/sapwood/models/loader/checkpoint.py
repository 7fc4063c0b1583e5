"""The common part of the readers of safetensors and of PyTorch checkpoints."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from sapwood.base.errors import WeightError
from sapwood.models.loader.reading import empty
from sapwood.store.files import ModelFiles, find_index, read_index


def as_dtype(tensor: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """The tensor in `dtype` if it holds plain floating-point numbers, else unchanged.

    Eight-bit floats are not cast: their scales would be missing. With dtype None every tensor stays
    unchanged.
    """
    is_plain = tensor.is_floating_point() and tensor.dtype.itemsize >= 2
    if not is_plain or dtype is None or tensor.dtype == dtype:
        return tensor
    return empty(tensor.shape, dtype).copy_(tensor)


class Expected:
    """The tensors that the index promises for each shard, if there is an index."""

    def __init__(self, files: ModelFiles) -> None:
        # A weight file that was given by its own path is read alone, whatever lies beside it.
        index = find_index(files.path, files.weight_format)
        named = read_index(index) if index is not None else {}
        given = {path.name for path in files.weights}
        self._named = named if set(named.values()) <= given else {}

    def check(self, shard: Path, names: Iterable[str]) -> None:
        """Raises WeightError, with the tensor's name, if the index promises more for this shard."""
        present = set(names)
        absent = sorted(
            name for name, file in self._named.items() if file == shard.name and name not in present
        )
        if absent:
            raise WeightError(
                f"{shard} lacks {len(absent)} tensors that the index says it has, first "
                f"{absent[0]}; download the model again"
            )
