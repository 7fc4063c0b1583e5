"""Classification heads: small, so each rank holds them whole, in fp32."""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.layers.targets import Target, whole


class Head(Protocol):
    def __call__(self, pooled: Tensor) -> Tensor:
        """pooled [R, hidden] fp32 -> [R, outputs] fp32"""
        ...

    def targets(self) -> dict[str, Target]: ...


class NoHead:
    """The hidden state itself is the answer."""

    def __call__(self, pooled: Tensor) -> Tensor:
        return pooled

    def targets(self) -> dict[str, Target]:
        return {}


class LinearHead:
    """Linear layers with tanh between them.

    sizes  name in the checkpoint -> outputs, in the order of the layers
    """

    def __init__(
        self, hidden_size: int, sizes: dict[str, int], *, bias: bool, device: torch.device
    ) -> None:
        self._layers: dict[str, tuple[Tensor, Tensor | None]] = {}
        in_size = hidden_size
        for name, out_size in sizes.items():
            weight = torch.empty(out_size, in_size, dtype=torch.float32, device=device)
            added = torch.empty(out_size, dtype=torch.float32, device=device) if bias else None
            self._layers[name] = (weight, added)
            in_size = out_size

    def __call__(self, pooled: Tensor) -> Tensor:
        x = pooled
        for index, (weight, bias) in enumerate(self._layers.values()):
            x = F.linear(x.tanh() if index else x, weight, bias)
        return x

    def targets(self) -> dict[str, Target]:
        found: dict[str, Target] = {}
        for name, (weight, bias) in self._layers.items():
            found[f"{name}.weight"] = whole(weight)
            if bias is not None:
                found[f"{name}.bias"] = whole(bias)
        return found


def encoder_head(
    names: tuple[str, str], hidden_size: int, num_labels: int, device: torch.device
) -> Head:
    """The head of an encoder; `names` of its two layers; num_labels 0: the model has none."""
    if not num_labels:
        return NoHead()
    sizes = dict(zip(names, (hidden_size, num_labels), strict=True))
    return LinearHead(hidden_size, sizes, bias=True, device=device)


def decoder_head(hidden_size: int, num_labels: int, device: torch.device) -> Head:
    if not num_labels:
        return NoHead()
    return LinearHead(hidden_size, {"score": num_labels}, bias=False, device=device)
