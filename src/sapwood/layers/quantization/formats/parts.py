"""The part of each tensor of a quantised layer that a part of the layer's weight needs.

The tensors are those of all formats: their names say which dimension has the weight's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.layers.quantization.formats.interface import is_unused
from sapwood.layers.targets import Slice

_OUTPUTS_FIRST = ("weight", "weight_packed", "weight_scale", "weight_scale_inv",
                  "weight_zero_point", "SCB")  # fmt: skip
"""[outputs, inputs] or [outputs]"""
_INPUTS_FIRST = ("qweight", "qzeros", "scales")
"""[inputs, outputs]"""
_INDICES = ("g_idx", "weight_g_idx")
"""[inputs]: the group of each"""
_CODES = ("weight", "weight_packed", "qweight")
_OF_THE_WHOLE = ("weight_format", "weight_shape", "weight_global_scale", "weight_scale_2")


def parts_of(
    shapes: Mapping[str, tuple[int, ...]],
    shape: tuple[int, int],
    own: Slice,
    units: tuple[int, int] | None,
) -> dict[str, Slice | None] | None:
    """Which part of each tensor is needed; None for a tensor that is needed whole.

    None instead of all: the layer's tensors cannot be cut like its weight, and have to be read.

    shapes  of the layer's tensors, by their names within the layer
    shape   of the whole weight: (outputs, inputs)
    own     the part of the weight
    units   as `CheckpointFormat.units` says

    Where an index says the group of each input, a part of the inputs may be in any groups: scales
    and zero points are needed of all groups then.
    """
    kinds = {kind for kind in shapes if not is_unused(kind)}
    if kinds == {"weight"}:  # not quantised, or with a scale of all of it
        units = (1, 1)
    if units is None:
        return None
    num, unit = shape[own.dim], units[own.dim]
    if num % unit or own.first % unit or own.size % unit:
        return None
    has_index = not kinds.isdisjoint(_INDICES)
    found: dict[str, Slice | None] = {}
    for kind, sizes in shapes.items():
        dim = _dim_of(kind, sizes, own.dim)
        if is_unused(kind) or kind in _OF_THE_WHOLE or dim == len(sizes):
            found[kind] = None
        elif dim is None or len(sizes) > 2:
            return None
        elif sizes[dim] == 1 or (has_index and own.dim and kind not in (*_CODES, *_INDICES)):
            found[kind] = None
        elif num % sizes[dim] or unit % (num // sizes[dim]):
            return None
        else:
            each = num // sizes[dim]
            found[kind] = Slice(dim=dim, first=own.first // each, size=own.size // each)
    return found


def _dim_of(kind: str, sizes: tuple[int, ...], dim: int) -> int | None:
    """The dimension that has the outputs (`dim` 0) or the inputs (1) of the weight.

    The number of dimensions: the tensor has none of these. None: an unknown tensor."""
    if kind in _INDICES:
        return 0 if dim else len(sizes)
    if kind in _OUTPUTS_FIRST:
        return min(dim, len(sizes))
    return 1 - dim if kind in _INPUTS_FIRST and len(sizes) == 2 else None
