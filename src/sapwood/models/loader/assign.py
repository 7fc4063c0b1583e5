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
    intake = _Intake(model)
    num_bytes = 0
    for name, tensor in FusedExperts(intake.targets).split(weights):
        target = intake.take(name, tensor)
        if target is not None:
            num_bytes += _place(target, tensor)
    _refuse_mistakes({"missing": intake.missing(), **intake.mistakes}, source)
    return LoadReport(
        num_tensors=len(intake.placed), num_bytes=num_bytes, ignored=tuple(intake.ignored)
    )


def check_weights(
    model: Loadable,
    weights: Iterable[tuple[str, Tensor | LinearPart]],
    *,
    source: str = "the update",
    may_be_partial: bool = False,
) -> None:
    """Raise WeightError, as `load_weights` would, without placing anything.

    weights         may be tensors without numbers, on torch's meta device
    may_be_partial  whether tensors may be missing, as long as the layers that are touched can keep
                    their other parts
    """
    intake = _Intake(model)
    for name, tensor in FusedExperts(intake.targets).split(weights):
        intake.take(name, tensor)
    missing = _lacking_parts(intake) if may_be_partial else intake.missing()
    kind = "missing beside others of the same quantised layers" if may_be_partial else "missing"
    _refuse_mistakes({kind: missing, **intake.mistakes}, source)


@dataclass(frozen=True, slots=True, kw_only=True)
class PutBeside:
    """Tensors of which most lie beside the numbers with which a model computes.

    num_tensors  of all
    late         those that can only be put where the model computes, with their targets
    """

    num_tensors: int
    late: Sequence[tuple[Target, Tensor | LinearPart]]

    def place_late(self) -> None:
        """Put the others. The model must be told to `finalize` afterwards."""
        for target, tensor in self.late:
            _place(target, tensor)


def put_beside(
    model: Loadable,
    weights: Iterable[tuple[str, Tensor | LinearPart]],
    *,
    source: str,
    may_be_partial: bool = False,
) -> PutBeside:
    """Put tensors where the model does not compute with them yet; its Renewal must be open. Raises
    WeightError as `check_weights`."""
    intake = _Intake(model)
    late: list[tuple[Target, Tensor | LinearPart]] = []
    for name, tensor in FusedExperts(intake.targets).split(weights):
        target = intake.take(name, tensor)
        if target is None:
            continue
        if target.is_beside:
            _place(target, tensor)
        else:  # a copy, since it may be part of a file that changes, or that would stay open
            late.append((target, tensor.clone() if isinstance(tensor, Tensor) else tensor))
    missing = [] if may_be_partial else intake.missing()
    _refuse_mistakes({"missing": missing, **intake.mistakes}, source)
    return PutBeside(num_tensors=len(intake.placed), late=late)


class _Intake:
    """Finds the targets of tensors, and notes what is wrong with them, by kind of mistake."""

    def __init__(self, model: Loadable) -> None:
        self.targets = model.targets()
        self.placed: set[str] = set()
        self.ignored: list[str] = []
        self.mistakes: dict[str, list[str]] = {
            "unexpected": [],
            "given twice": [],
            "of the wrong shape": [],
            "not of floating point": [],
        }
        self._patterns = model.ignorable_tensors()

    def take(self, name: str, tensor: Tensor | LinearPart) -> Target | None:
        """Where the tensor is to be placed; None if it is not needed, or wrong."""
        target = self.targets.get(name)
        if target is None:
            is_ignorable = any(fnmatchcase(name, pattern) for pattern in self._patterns)
            (self.ignored if is_ignorable else self.mistakes["unexpected"]).append(name)
            return None
        if name in self.placed:
            self.mistakes["given twice"].append(name)
            return None
        self.placed.add(name)
        if tuple(tensor.shape) not in (target.shape, target.part_shape):
            what = f"{name} (is {list(tensor.shape)}, must be {list(target.shape)})"
            self.mistakes["of the wrong shape"].append(what)
            return None
        if isinstance(tensor, Tensor) and not _has_numbers_for(target, tensor):
            what = f"{name} (is {str(tensor.dtype).removeprefix('torch.')})"
            self.mistakes["not of floating point"].append(what)
            return None
        return target

    def missing(self) -> list[str]:
        return [
            name
            for name, target in self.targets.items()
            if name not in self.placed and not target.is_elsewhere
        ]


def _lacking_parts(intake: _Intake) -> list[str]:
    """The tensors without which a touched layer, which cannot keep its other parts, is no whole."""
    touched = {id(intake.targets[name].fused_with) for name in intake.placed}
    # Asked last, of few: to know it a layer may have to unpack its weight.
    return [
        name
        for name in intake.missing()
        if (layer := intake.targets[name].fused_with) is not None
        and id(layer) in touched
        and not layer.keeps_parts
    ]


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
