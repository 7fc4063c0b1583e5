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
        for name, target in targets.items():
            if target.fused_in is not None:
                piece = _Piece(name, target.fused_in)
                self._weights.setdefault(target.fused_in.name, []).append(piece)

    def _pieces(self, name: str) -> list[_Piece]:
        """What a fused tensor is made of; none of any other tensor."""
        if name in self._weights:
            return self._weights[name]
        for end, kind in _KINDS.items():
            if name.endswith(end):
                of_weight = self._weights.get(name.removesuffix(end), [])
                return [piece.beside(kind) for piece in of_weight]
        return []

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of the tensors that `split` gives."""
        found: list[str] = []
        for name in names:
            found += [piece.name for piece in self._pieces(name)] or [name]
        return found

    def split(self, tensors: Iterable[tuple[str, T]]) -> Iterator[tuple[str, T | Tensor]]:
        """The same tensors; a fused one [experts, outputs, …] as one per expert and layer.

        Raises WeightError if a fused tensor does not have the model's number of experts."""
        for name, tensor in tensors:
            pieces = self._pieces(name)
            if not pieces or not isinstance(tensor, Tensor):
                yield name, tensor
                continue
            num_experts = pieces[0].where.num_experts
            if tensor.dim() < 1 or tensor.shape[0] != num_experts:
                raise WeightError(
                    f"{name} is {list(tensor.shape)} but must have {num_experts} experts; "
                    "config.json and the weights do not belong together"
                )
            for piece in pieces:
                yield piece.name, piece.of(tensor)
