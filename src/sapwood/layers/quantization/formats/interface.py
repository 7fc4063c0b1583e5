"""What a format must define: how the tensors of one linear layer become a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, WeightError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.targets import Slice

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_UNUSED = ("input_scale", "input_zero_point", "input_global_scale", "output_scale", "k_scale",
           "v_scale", "q_scale", "k_zero_point", "v_zero_point")  # fmt: skip
"""Tensors about activations and the KV cache, which are passed over: only weights are read."""


class LinearTensors:
    """The tensors of one layer, by their names within the layer, checked when they are taken.

    shape        shape of the weight that they stand for: (outputs, inputs)
    part         the part of the layer's weight that they stand for, as parts.py cuts them; None:
                 all of it
    whole_shape  shape of the layer's weight
    """

    def __init__(
        self,
        module: str,
        whole_shape: tuple[int, int],
        tensors: Mapping[str, Tensor],
        format_name: str,
        part: Slice | None = None,
    ) -> None:
        self.module = module
        self.whole_shape = whole_shape
        self.part = part
        self.shape = whole_shape
        if part is not None:
            num_out, num_in = whole_shape
            self.shape = (num_out, part.size) if part.dim else (part.size, num_in)
        self._tensors = tensors
        self._format_name = format_name
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def take(
        self, name: str, shapes: Sequence[tuple[int, ...]] = (), dtypes: Sequence[torch.dtype] = ()
    ) -> Tensor:
        """The tensor `name`; WeightError if it is missing or has an unexpected shape or dtype.

        An empty list of shapes or dtypes allows any.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise WeightError(
                f"the checkpoint lacks {self.module}.{name}, which {self._format_name} weights "
                "need; download the model again, or fix quantization_config in config.json"
            )
        self._taken.add(name)
        has_shape = not shapes or tuple(tensor.shape) in shapes
        if not has_shape or (dtypes and tensor.dtype not in dtypes):
            wanted = " or ".join(str(list(shape)) for shape in dict.fromkeys(shapes)) or "any shape"
            kinds = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            found = str(tensor.dtype).removeprefix("torch.")
            raise WeightError(
                f"{self.module}.{name} is {list(tensor.shape)} {found} but must be {wanted}"
                f"{' of ' + kinds if kinds else ''} for a {self._format_name} weight "
                f"{list(self.shape)}; config.json and the weights do not belong together"
            )
        return tensor

    def dense(self) -> Tensor | None:
        """The weight, if this layer is not quantised."""
        weight = self._tensors.get("weight")
        if weight is None or weight.dtype not in FLOATS:
            return None
        return self.take("weight", [self.shape])

    def scales(self, name: str, shapes: Sequence[tuple[int, ...]]) -> Tensor:
        """The tensor `name`, which must hold floating-point numbers, as fp32."""
        return self.take(name, shapes, FLOATS).float()

    def refuse_others(self) -> None:
        """Raises WeightError if some tensors were not taken and are not known to be unused."""
        others = sorted(set(self._tensors) - self._taken - set(_UNUSED))
        if others:
            raise WeightError(
                f"the checkpoint has {', '.join(f'{self.module}.{name}' for name in others)}, "
                f"which mean nothing in a {self._format_name} weight; config.json and the "
                "weights do not belong together"
            )


class CheckpointFormat(Protocol):
    """One format of quantised checkpoints.

    name            the format's name in --quantization and `sapwood check`
    summary         the stored and the computed numbers in words, for `sapwood check`
    weight_bytes    bytes per weight of a quantised layer, for estimates
    """

    @property
    def name(self) -> str: ...
    @property
    def summary(self) -> str: ...
    @property
    def weight_bytes(self) -> float: ...

    def units(self, module: str) -> tuple[int, int] | None:
        """Outputs and inputs that cannot be parted from each other in the layer's tensors: a part
        of a weight can be read alone if it begins and ends at multiples of these. None: no part."""
        ...

    def linear(self, tensors: LinearTensors) -> Tensor | LinearPart:
        """The layer's weight in its quantised form, or dense if the layer is not quantised.

        Raises WeightError, with its name, if a tensor is missing or does not fit."""
        ...


def is_unused(name: str) -> bool:
    """Whether a tensor of that name describes activations or the KV cache."""
    return name.rpartition(".")[2] in _UNUSED


def integer(config: Mapping[str, Any], name: str, allowed: Sequence[int], what: str) -> int:
    """A field of quantization_config; ConfigError if it is not one of `allowed`."""
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise ConfigError(
            f"quantization_config of this {what} checkpoint has {name} {value!r}; supported: "
            f"{', '.join(map(str, allowed))}. Use another version of the model, or its unquantised "
            "checkpoint with --quantization w4a8 or w8a8_int8"
        )
    return value


def group_of(config: Mapping[str, Any], what: str) -> int:
    """group_size: -1 or a multiple of 8."""
    value = config.get("group_size", 128)
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or (value != -1 and (value < 8 or value % 8))
    ):
        raise ConfigError(
            f"quantization_config of this {what} checkpoint has group_size {value!r}; supported: "
            "-1 (one group per output) and multiples of 8"
        )
    return value


def in_groups(group: int) -> str:
    return "one scale per output" if group == -1 else f"groups of {group} inputs"
