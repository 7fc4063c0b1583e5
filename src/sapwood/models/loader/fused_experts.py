"""Splits tensors of all experts into those of each expert's linear layers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.layers.targets import FusedIn, Target

_KINDS = {
    "_blocks": "weight_blocks",
    "_scales": "weight_scales",
    "_scale": "weight_scale",
    "_scale_inv": "weight_scale_inv",
}
"""What quantised checkpoints have beside a fused weight: the end of its name -> a tensor of one
expert's layer."""
_NEVER_TRANSPOSED = ("weight_blocks", "weight_scales")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Piece:
    """One expert's tensor: its own name, and where it is in the fused one."""

    name: str
    where: FusedIn

    def beside(self, kind: str) -> _Piece:
        """The tensor `kind` of the same layer, of a fused one with the same experts and parts."""
        transposed = self.where.transposed and kind not in _NEVER_TRANSPOSED
        name = f"{self.name.rpartition('.')[0]}.{kind}"
        return _Piece(name, replace(self.where, transposed=transposed))

    def of(self, fused: Tensor) -> Tensor:
        """fused [experts, outputs, …], or of scales that outputs share [experts] or [experts, 1]"""
        own, where = fused[self.where.expert], self.where
        if where.transposed and own.dim() == 2:
            own = own.T
        if own.dim() == 0 or own.shape[0] % where.num_parts:
            return own
        if where.takes_turns:
            return own[where.part :: where.num_parts]
        return own.chunk(where.num_parts)[where.part]


class FusedExperts:
    """targets: of the model, by name; those of experts say in which fused tensors they may be."""

    def __init__(self, targets: Mapping[str, Target]) -> None:
        self._weights: dict[str, list[_Piece]] = {}
        self._num_experts: dict[str, int] = {}
        for name, target in targets.items():
            if target.fused_in is not None:
                pieces = self._weights.setdefault(target.fused_in.name, [])
                self._num_experts[target.fused_in.name] = target.fused_in.num_experts
                if not target.is_elsewhere:
                    pieces.append(_Piece(name, target.fused_in))

    def experts(self, name: str) -> list[int] | None:
        """The experts of a fused tensor that this rank has; None of any other tensor."""
        pieces = self._pieces(name)
        return None if pieces is None else sorted({piece.where.expert for piece in pieces})

    def _weight_of(self, name: str) -> str | None:
        """The fused weight itself, or the one beside which the tensor is."""
        found = [name, *(name.removesuffix(end) for end in _KINDS if name.endswith(end))]
        return next((one for one in found if one in self._weights), None)

    def _pieces(self, name: str) -> list[_Piece] | None:
        """What this rank takes of a fused tensor; None of any other tensor."""
        if name in self._weights:
            return self._weights[name]
        for end, kind in _KINDS.items():
            if name.endswith(end):
                of_weight = self._weights.get(name.removesuffix(end))
                return of_weight and [piece.beside(kind) for piece in of_weight]
        return None

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of the tensors that `split` gives."""
        found: list[str] = []
        for name in names:
            pieces = self._pieces(name)
            found += [name] if pieces is None else [piece.name for piece in pieces]
        return found

    def split(self, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T | Tensor]]:
        """The same tensors; a fused one [experts, outputs, …] as one per layer of each expert that
        this rank has.

        Raises WeightError if a fused tensor does not have the model's number of experts."""
        for name, tensor in tensors:
            pieces = self._pieces(name)
            if pieces is None or not isinstance(tensor, Tensor):
                yield name, tensor
                continue
            weight = self._weight_of(name)
            assert weight is not None, "it has pieces"
            num_experts = self._num_experts[weight]
            if tensor.dim() < 1 or tensor.shape[0] != num_experts:
                raise WeightError(
                    f"{name} is {list(tensor.shape)} but must have {num_experts} experts; "
                    "config.json and the weights do not belong together"
                )
            for piece in pieces:
                yield piece.name, piece.of(tensor)
