"""Prepared pictures and videos as tensors; checks of what a request may have brought itself."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import torch
from torch import Tensor

from sapwood.schema.media import MediaTensor, Medium

_DTYPES: Mapping[str, str] = {"float32": "<f4", "float64": "<f8", "int64": "<i8", "int32": "<i4"}


def tensor_of(medium: Medium, name: str) -> Tensor:
    """The tensor of that name, on the CPU; `why_malformed` must have found nothing wrong."""
    found = medium.tensors[name]
    numbers = np.frombuffer(found.data, dtype=_DTYPES[found.dtype]).reshape(found.shape)
    return torch.from_numpy(numbers.copy())


def integers_of(medium: Medium, name: str) -> list[int]:
    """All numbers of a small tensor of integers, row by row."""
    found = medium.tensors[name]
    return [int(one) for one in np.frombuffer(found.data, dtype=_DTYPES[found.dtype])]


def why_malformed(medium: Medium, names: Mapping[str, bool]) -> str | None:
    """Why a medium cannot be read at all; None if it can.

    names  of the tensors that it must have, and whether they are of integers"""
    for name, has_integers in names.items():
        found = medium.tensors.get(name)
        if found is None:
            return f"a prepared {medium.kind} has no {name}; this model needs it"
        wrong = _why_no_tensor(found, has_integers)
        if wrong is not None:
            return f"{name} of a prepared {medium.kind} {wrong}"
    return None


def _why_no_tensor(found: MediaTensor, has_integers: bool) -> str | None:
    kind = "int" if has_integers else "float"
    if found.dtype not in _DTYPES or not found.dtype.startswith(kind):
        return f"is of {found.dtype!r}; it must be of {kind}32 or {kind}64"
    if min(found.shape, default=1) < 1:
        return f"has the shape {list(found.shape)}"
    size = np.dtype(_DTYPES[found.dtype]).itemsize
    if prod(found.shape) * size != len(found.data):
        return f"has {len(found.data)} bytes, which the shape {list(found.shape)} does not take"
    return None
