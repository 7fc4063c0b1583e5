"""Solar Pro. Source: Upstage 2024, its model code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import FeedForward, Layer, summed
from sapwood.layers.norm import Norm
from sapwood.layers.streams import Streams
from sapwood.layers.targets import Target, prefixed
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.llama import LlamaForCausalLM


class SolarForCausalLM(LlamaForCausalLM):
    """Llama, where hidden states before some layers are kept, and blended into those before some
    later ones. There are two places for kept ones; later ones replace earlier ones."""

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        config = super().read(hf)
        for place in (1, 2):
            kept, blended = (_layers(config, number) for number in (place, place + 2))
            if blended and (not kept or min(blended) < min(kept)):
                raise ConfigError(
                    f"config.json blends hidden states of bskcn_{place} before it keeps any"
                )
        weight_of_kept(config)
        return config

    def streams(self) -> Streams:
        return _KeptStates(self.names.norm, self.norm(), self.config.hidden_size)

    def layer(self, index: int) -> Layer:
        config = self.config
        places = (1, 2)
        return _BlendingLayer(
            super().layer(index),
            config.hidden_size,
            keeps=tuple(place for place in places if index in _layers(config, place)),
            blends=tuple(place for place in places if index in _layers(config, place + 2)),
            weight=weight_of_kept(config),
        )


class _KeptStates(Streams):
    """The hidden states, and two places for kept ones, side by side: [T, 3 * hidden]."""

    def __init__(self, name: str, norm: Norm, hidden_size: int) -> None:
        self._name = name
        self._norm = norm
        self._hidden_size = hidden_size

    def opened(self, x: Tensor, batch: ForwardBatch) -> Tensor:
        return torch.cat((x, x.new_zeros(x.shape[0], 2 * self._hidden_size)), dim=-1)

    def closed(self, x: Tensor) -> Tensor:
        return self._norm(x[:, : self._hidden_size].contiguous())

    def targets(self) -> dict[str, Target]:
        return prefixed(self._name, self._norm.targets())

    def pack(self) -> None:
        """Nothing here is packed."""


class _BlendingLayer(Layer):
    """A layer that first keeps its inputs in `keeps`, then blends what is kept in `blends` in."""

    def __init__(
        self,
        inner: Layer,
        hidden_size: int,
        *,
        keeps: tuple[int, ...],
        blends: tuple[int, ...],
        weight: float,
    ) -> None:
        self._inner = inner
        self._hidden_size = hidden_size
        self._keeps = keeps
        self._blends = blends
        self._weight = weight

    def __call__(
        self, x: Tensor, residual: Tensor | None, batch: ForwardBatch
    ) -> tuple[Tensor, Tensor | None]:
        """x [T, 3 * hidden]; there is never a residual"""
        parts = list(torch.split(x, self._hidden_size, dim=-1))
        for place in self._keeps:
            parts[place] = parts[0]
        for place in self._blends:
            parts[0] = parts[place] * self._weight + parts[0] * (1.0 - self._weight)
        # A layer adds to what it is given in place, and what is kept must stay.
        parts[0] = summed(*self._inner(parts[0].clone(), residual, batch))
        return torch.cat(parts, dim=-1), None

    def change_feed_forwards(self, change: Callable[[FeedForward], FeedForward]) -> None:
        self._inner.change_feed_forwards(change)

    def targets(self) -> dict[str, Target]:
        return self._inner.targets()

    def pack(self) -> None:
        self._inner.pack()


def _layers(config: DecoderConfig, number: int) -> tuple[int, ...]:
    """The layers that config.json lists as bskcn_<number>."""
    name = f"bskcn_{number}"
    found = config.hf.get(name) or ()
    if not isinstance(found, list | tuple) or not all(isinstance(one, int) for one in found):
        raise ConfigError(f"config.json must have a list of layers as {name!r}, got {found!r}")
    return tuple(found)


def weight_of_kept(config: DecoderConfig) -> float:
    """The share of kept hidden states, the second number of bskcn_tv (the first is training's)."""
    found = config.hf.get("bskcn_tv", (0.9, 0.8))
    if (
        not isinstance(found, list | tuple)
        or len(found) != 2
        or not all(isinstance(one, int | float) and 0 <= one <= 1 for one in found)
    ):
        raise ConfigError(f"config.json must have two shares as 'bskcn_tv', got {found!r}")
    return float(found[1])
