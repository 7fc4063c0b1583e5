"""Splits gpt-oss's MXFP4 tensors of all experts into those of each expert's linear layers."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import count

from torch import Tensor

from sapwood.base.errors import WeightError

ShapeOf = Callable[[str], tuple[int, ...] | None]
"""Name of a checkpoint's tensor -> the shape that the model wants; None: no such tensor."""

_FUSED = re.compile(r"(.+\.experts)\.(gate_up|down)_proj_(blocks|scales|bias)")
_KINDS = {"blocks": "weight_blocks", "scales": "weight_scales", "bias": "bias"}
_PARTS = {"gate_up": ("gate_proj", "up_proj"), "down": ("down_proj",)}
"""Layers whose outputs take turns in a fused tensor."""


class FusedExperts:
    """shape_of: tells whether, and for how many experts, the model wants tensors of each expert."""

    def __init__(self, shape_of: ShapeOf) -> None:
        self._shape_of = shape_of

    def names(self, names: Iterable[str]) -> list[str]:
        """The names of the tensors that `split` gives."""
        return [own for name in names for own, _, _, _ in self._own(name) or [(name, 0, 0, 0)]]

    def split(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """The same tensors; a fused one [experts, outputs, …] as one per expert and layer.

        Raises WeightError if a fused tensor does not have the model's number of experts."""
        for name, tensor in tensors:
            own = self._own(name)
            if not own:
                yield name, tensor
                continue
            num_experts = own[-1][1] + 1
            if tensor.dim() < 2 or tensor.shape[0] != num_experts:
                raise WeightError(
                    f"{name} is {list(tensor.shape)} but must have {num_experts} experts; "
                    "config.json and the weights do not belong together"
                )
            for own_name, expert, first, step in own:
                yield own_name, tensor[expert, first::step]

    def _own(self, name: str) -> list[tuple[str, int, int, int]]:
        """(name, expert, first output, step between outputs) of each part of a fused tensor."""
        match = _FUSED.fullmatch(name)
        if match is None:
            return []
        prefix, fused, kind = match.groups()
        parts = _PARTS[fused]
        found: list[tuple[str, int, int, int]] = []
        for expert in count():
            if self._shape_of(f"{prefix}.{expert}.{parts[0]}.weight") is None:
                return found
            for first, part in enumerate(parts):
                own = f"{prefix}.{expert}.{part}.{_KINDS[kind]}"
                found.append((own, expert, first, len(parts)))
        return found
