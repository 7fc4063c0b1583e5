"""Places the tensors of a checkpoint into a model's parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Protocol

import torch
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.targets import Target
from sapwood.models.loader.fused_experts import FusedExperts

_NAMED_AT_MOST = 20
"""Names that are listed for each kind of mistake; the rest are counted."""


class Loadable(Protocol):
    """The part of a model that the loader uses."""

    def targets(self) -> Mapping[str, Target]: ...

    def ignorable_tensors(self) -> Sequence[str]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """The result of loading.

    num_tensors  number of placed tensors
    num_bytes    their size in the checkpoint, over all ranks
    ignored      names of the checkpoint's tensors that are known not to be needed
    """

    num_tensors: int
    num_bytes: int
    ignored: tuple[str, ...]


def load_weights(
    model: Loadable,
    weights: Iterable[tuple[str, Tensor | LinearPart]],
    *,
    source: str = "the checkpoint",
) -> LoadReport:
    """Place every tensor where the model wants it, holding one at a time. Those that other ranks
    have may be missing.

    A tensor is whole, or this rank's part of it (`Target.part`), or one of all experts
    (`Target.fused_in`).

    Quantised tensors are dequantised for layers that do not take them in their own form.

    source  where the weights come from, for errors
    Raises  WeightError, with the names (up to 20 of each kind), if tensors are missing, unexpected,
            given twice, or of the wrong shape or type. The model is half filled then, and unusable
    """
    targets = model.targets()
    patterns = model.ignorable_tensors()
    placed: set[str] = set()
    ignored: list[str] = []
    unexpected: list[str] = []
    repeated: list[str] = []
    misshapen: list[str] = []
    mistyped: list[str] = []
    num_bytes = 0
    for name, tensor in FusedExperts(targets).split(weights):
        target = targets.get(name)
        if target is None:
            is_ignorable = any(fnmatchcase(name, pattern) for pattern in patterns)
            (ignored if is_ignorable else unexpected).append(name)
        elif name in placed:
            repeated.append(name)
        else:
            placed.add(name)
            if tuple(tensor.shape) not in (target.shape, target.part_shape):
                expected = list(target.shape)
                misshapen.append(f"{name} (is {list(tensor.shape)}, must be {expected})")
            elif isinstance(tensor, Tensor) and not _has_numbers_for(target, tensor):
                mistyped.append(f"{name} (is {str(tensor.dtype).removeprefix('torch.')})")
            else:
                num_bytes += _place(target, tensor)
    missing = [
        name for name, target in targets.items() if name not in placed and not target.is_elsewhere
    ]
    _refuse_mistakes(
        {
            "missing": missing,
            "unexpected": unexpected,
            "given twice": repeated,
            "of the wrong shape": misshapen,
            "not of floating point": mistyped,
        },
        source,
    )
    return LoadReport(num_tensors=len(placed), num_bytes=num_bytes, ignored=tuple(ignored))


def _has_numbers_for(target: Target, tensor: Tensor) -> bool:
    is_plain = tensor.is_floating_point() and tensor.dtype.itemsize >= 2
    return is_plain or target.takes_integers


def _place(target: Target, tensor: Tensor | LinearPart) -> int:
    """Place one tensor. Returns its bytes in the checkpoint."""
    is_whole = tuple(tensor.shape) == target.shape
    place = target.place if is_whole else target.put
    if isinstance(tensor, Tensor):
        place(tensor)
        return tensor.numel() * tensor.element_size()
    if target.put_blocks is None:
        place(tensor.dequantized(torch.float32))
    else:
        (target.place_blocks if is_whole else target.put_blocks)(tensor)
    return tensor.num_bytes


def _refuse_mistakes(mistakes: Mapping[str, Sequence[str]], source: str) -> None:
    found = [f"{len(names)} {kind}: {_list(names)}" for kind, names in mistakes.items() if names]
    if found:
        raise WeightError(
            f"{source} does not fit the architecture; {'; '.join(found)}. "
            "Check that config.json and the weights are of the same model and complete"
        )


def _list(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMED_AT_MOST])
    more = len(names) - _NAMED_AT_MOST
    return f"{shown} and {more} more" if more > 0 else shown
