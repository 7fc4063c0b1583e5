"""LLaVA-NeXT and LLaVA-OneVision: a small picture of the whole, then tiles of the large one without
what was added to fill them, each row with a learned vector at its end.

Source: Liu et al. 2024, LLaVA-NeXT; Li et al. 2024, arXiv:2408.03326."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.targets import Target, whole
from sapwood.models.vision.llava import LlavaTower
from sapwood.models.vision.prepared import integers_of, why_malformed
from sapwood.models.vision.tiles import PIXELS
from sapwood.schema.media import Medium
from sapwood.schema.tile_grids import best_grid, shrunk, unpadded

_SIZES = "image_sizes"


class LlavaNextTower(LlavaTower):
    """image_sizes of a medium are the height and the width of its picture in pixels."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        super().__init__(hf_config, build)
        pins = hf_config.get("image_grid_pinpoints")
        if not _are_pairs(pins):
            raise ConfigError(f"config.json must have pairs as image_grid_pinpoints, got {pins!r}")
        self._pins: Sequence[tuple[int, int]] = [(one[0], one[1]) for one in pins or []]
        if self.tokens_per_tile != self.form.side**2:
            raise ConfigError(
                "LLaVA-NeXT is implemented where a tile has a vector for each of its patches; "
                "serve the text part with --language-only"
            )
        self._row_end = build.empty(self.vector_size)

    def why_unfit(self, medium: Medium) -> str | None:
        if medium.kind != "image":
            return "this model sees images, but no videos"
        wrong = why_malformed(medium, {PIXELS: False, _SIZES: True})
        if wrong is not None:
            return wrong
        size = integers_of(medium, _SIZES)
        if len(size) != 2 or not 1 <= min(size) <= max(size) <= 1 << 16:
            return f"image_sizes must be two sizes from 1 to 65,536, got {size[:10]}"
        rows, columns = self._grid(medium)
        tiles = 1 + rows * columns
        side = self.form.image_size
        shape = (tiles, self.form.channels, side, side)
        if medium.tensors[PIXELS].shape != shape:
            return (
                f"pixel_values of a prepared image of {size[0]} x {size[1]} pixels must have the "
                f"shape {list(shape)}, got {list(medium.tensors[PIXELS].shape)}"
            )
        height, width = self._shown(medium)
        count = self.form.side**2 + height * (width + 1)
        if medium.num_tokens != count:
            return (
                f"an image of {size[0]} x {size[1]} pixels stands for {count} tokens of the "
                f"prompt, not for {medium.num_tokens}"
            )
        return None

    def _grid(self, medium: Medium) -> tuple[int, int]:
        """Rows and columns of tiles."""
        height, width = best_grid(integers_of(medium, _SIZES), self._pins)
        return height // self.form.image_size, width // self.form.image_size

    def _shown(self, medium: Medium) -> tuple[int, int]:
        """Rows and columns of vectors of the large picture."""
        _, (height, width) = self._cut(medium)
        return height, width

    def _cut(self, medium: Medium) -> tuple[tuple[int, int], tuple[int, int]]:
        """What of the patches of all tiles shows the picture: ((first row, first column), sizes)"""
        rows, columns = self._grid(medium)
        side = self.form.side
        return unpadded(integers_of(medium, _SIZES), (rows * side, columns * side))

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        counts = [medium.tensors[PIXELS].shape[0] for medium in media]
        tiles = self.vectors(media).view(sum(counts), self.form.side**2, self.vector_size)
        pieces = tiles.split_with_sizes(counts)
        return [self._packed(medium, own) for medium, own in zip(media, pieces, strict=True)]

    def _packed(self, medium: Medium, tiles: Tensor) -> Tensor:
        """tiles [1 + tiles, side², vector] -> [tokens, vector]"""
        rows, columns = self._grid(medium)
        side = self.form.side
        large = tiles[1:].view(rows, columns, side, side, -1).transpose(1, 2)
        large = large.reshape(rows * side, columns * side, -1)
        (top, left), (height, width) = self._cut(medium)
        large = self._shrunk(large[top : top + height, left : left + width], medium)
        ends = self._row_end.expand(len(large), 1, -1)
        return torch.cat((tiles[0], torch.cat((large, ends), dim=1).flatten(0, 1)))

    def _shrunk(self, large: Tensor, medium: Medium) -> Tensor:
        return large

    def targets(self) -> dict[str, Target]:
        return super().targets() | {"image_newline": whole(self._row_end)}


class LlavaOnevisionTower(LlavaNextTower):
    """SigLIP's tower; a large picture is made smaller in vectors if it has too many."""

    layer_by_default: ClassVar = -1
    strategy_by_default: ClassVar[str] = "full"

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        super().__init__(hf_config, build)
        said = str(hf_config.get("vision_aspect_ratio") or "anyres_max_9")
        if not said.removeprefix("anyres_max_").isdigit():
            raise ConfigError(
                f"of LLaVA-OneVision's vision_aspect_ratio 'anyres_max_' and a number is "
                f"implemented, not {said!r}; serve the text part with --language-only"
            )
        self._most_tiles = int(said.removeprefix("anyres_max_"))

    def _shown(self, medium: Medium) -> tuple[int, int]:
        return shrunk(super()._shown(medium), self._most_tiles * self.form.side**2)

    def _shrunk(self, large: Tensor, medium: Medium) -> Tensor:
        size = self._shown(medium)
        if size == large.shape[:2]:
            return large
        first = large.permute(2, 0, 1)[None]
        return F.interpolate(first, size, mode="bilinear")[0].permute(1, 2, 0)


def _are_pairs(pins: Any) -> bool:
    return (
        isinstance(pins, list)
        and bool(pins)
        and all(
            isinstance(one, list)
            and len(one) == 2
            and all(isinstance(size, int) and size > 0 for size in one)
            for one in pins
        )
    )
