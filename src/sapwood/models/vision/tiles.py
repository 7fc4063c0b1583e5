"""Pictures as rows of tiles, which are squares of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isqrt
from typing import Any

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.models.hf_fields import integer
from sapwood.models.vision.prepared import why_malformed
from sapwood.schema.media import Medium

PIXELS = "pixel_values"


@dataclass(frozen=True, slots=True, kw_only=True)
class TileForm:
    """How a family cuts tiles into patches.

    image_size  side of a tile in pixels
    patch       side of a patch in pixels
    has_class   whether a learned vector comes before the patches
    """

    image_size: int
    patch: int
    channels: int
    has_class: bool

    @staticmethod
    def read(hf: Mapping[str, Any], *, has_class: bool) -> TileForm:
        """From the vision_config of a config.json."""
        return TileForm(
            image_size=_side(hf, "image_size"),
            patch=_side(hf, "patch_size"),
            channels=integer(hf, "num_channels", default=3),
            has_class=has_class,
        )

    @property
    def side(self) -> int:
        """Of a tile, in patches."""
        return self.image_size // self.patch

    @property
    def num_places(self) -> int:
        """States of a tile."""
        return self.side**2 + self.has_class

    def num_patches(self, medium: Medium) -> int:
        return medium.tensors[PIXELS].shape[0] * self.num_places

    def why_unfit(self, medium: Medium, tokens_per_tile: int) -> str | None:
        """Why a medium is no row of tiles that stand for that many tokens each."""
        if medium.kind != "image":
            return "this model sees images, but no videos"
        wrong = why_malformed(medium, {PIXELS: False})
        if wrong is not None:
            return wrong
        shape, tile = medium.tensors[PIXELS].shape, (self.channels, *[self.image_size] * 2)
        if len(shape) != 4 or shape[1:] != tile:
            return (
                "pixel_values of a prepared image must have the shape "
                f"[tiles, {', '.join(map(str, tile))}], got {list(shape)}"
            )
        if medium.num_tokens != shape[0] * tokens_per_tile:
            return (
                f"an image of {shape[0]} tiles stands for {shape[0]} x {tokens_per_tile} tokens of "
                f"the prompt, not for {medium.num_tokens}"
            )
        return None


def blocks_of(x: Tensor, scale: int) -> Tensor:
    """States of `scale` x `scale` neighbours put together: x [tiles, side * side, size] -> [tokens
    of all tiles, scale² * size]"""
    side = isqrt(x.shape[1])
    blocks = side // scale
    x = x.reshape(len(x), blocks, scale, blocks, scale, x.shape[2])
    return x.transpose(2, 3).reshape(len(x) * blocks**2, -1)


def _side(hf: Mapping[str, Any], name: str) -> int:
    """A size that is a number, or two equal ones."""
    value = hf.get(name)
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise ConfigError(f"config.json must have a square as {name!r}, got {value!r}")
        return integer({name: value[0]}, name)
    return integer(hf, name)
