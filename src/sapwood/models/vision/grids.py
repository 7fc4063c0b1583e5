"""Pictures and videos as grids of patches: Qwen's families and those that follow them.

A medium is [frames, height, width] patches. Of `merge` x `merge` neighbouring patches a tower makes
one vector, so patches come block by block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.models.vision.prepared import integers_of, tensor_of, why_malformed
from sapwood.schema.media import Medium


@dataclass(frozen=True, slots=True)
class Grid:
    """Sizes of a medium in patches."""

    frames: int
    height: int
    width: int

    @property
    def num_patches(self) -> int:
        return self.frames * self.height * self.width


@dataclass(frozen=True, slots=True, kw_only=True)
class GridForm:
    """How a family cuts media into patches.

    merge         patches side by side, and one above another, of which one vector is made
    patch_numbers  numbers of a patch, over all colours and frames of it
    """

    merge: int
    patch_numbers: int

    def why_unfit(self, medium: Medium) -> str | None:
        """Why a request with that medium is refused; None if it is not."""
        pixels, sizes = names_of(medium)
        wrong = why_malformed(medium, {pixels: False, sizes: True})
        if wrong is not None:
            return wrong
        numbers = integers_of(medium, sizes)
        if len(numbers) != 3 or min(numbers) < 1:
            return f"{sizes} of a prepared {medium.kind} must be three sizes, got {numbers[:10]}"
        grid, shape = Grid(*numbers), medium.tensors[pixels].shape
        if grid.height % self.merge or grid.width % self.merge:
            return f"height and width in {sizes} must be multiples of {self.merge}, got {numbers}"
        if shape[:1] != (grid.num_patches,) or prod(shape[1:]) != self.patch_numbers:
            return (
                f"{pixels} of a prepared {medium.kind} must have the shape "
                f"[{grid.num_patches}, {self.patch_numbers}], got {list(shape)}"
            )
        per_frame = grid.height * grid.width // self.merge**2
        if medium.num_tokens != grid.frames * per_frame or any(
            length % per_frame for _, length in medium.spans
        ):
            return (
                f"a {medium.kind} of the sizes {numbers} stands for {grid.frames} x {per_frame} "
                f"tokens of the prompt, not for {medium.num_tokens}"
            )
        return None


def names_of(medium: Medium) -> tuple[str, str]:
    """The names of the tensors of patches and of sizes, as transformers' processors name them."""
    if medium.kind == "video":
        return "pixel_values_videos", "video_grid_thw"
    return "pixel_values", "image_grid_thw"


def grid_of(medium: Medium) -> Grid:
    return Grid(*integers_of(medium, names_of(medium)[1]))


def patches_of(media: Sequence[Medium]) -> Tensor:
    """[patches of all, numbers of a patch]"""
    return torch.cat([tensor_of(medium, names_of(medium)[0]).flatten(1) for medium in media])


def block_places(grid: Grid, merge: int) -> tuple[Tensor, Tensor]:
    """(row, column) of each patch of one frame, in the order of blocks: [height * width] int64"""
    blocks = (grid.height // merge, merge, grid.width // merge, merge)
    row = torch.arange(grid.height)[:, None].expand(grid.height, grid.width)
    column = torch.arange(grid.width)[None].expand(grid.height, grid.width)
    return (
        row.reshape(blocks).transpose(1, 2).flatten(),
        column.reshape(blocks).transpose(1, 2).flatten(),
    )


def rotation_table(grids: Sequence[Grid], merge: int, head_dim: int, theta: float) -> Tensor:
    """[patches, head_dim] fp32: cosines, then sines, of a rotation by row and by column."""
    frequency = 1.0 / theta ** (
        torch.arange(0, head_dim // 2, 2, dtype=torch.float32) / (head_dim // 2)
    )
    tables = []
    for grid in grids:
        row, column = block_places(grid, merge)
        angle = torch.cat((row[:, None] * frequency, column[:, None] * frequency), dim=-1)
        tables.append(torch.cat((angle.cos(), angle.sin()), dim=-1).repeat(grid.frames, 1))
    return torch.cat(tables)


def rotated(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D], each rotated by its row of cos_sin [T, D], halves paired"""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def axis_positions(
    num_tokens: int, media: Sequence[Medium], merge: int, *, frame_steps: Sequence[float]
) -> NDArray[np.int64]:
    """Positions of a prompt's tokens in time, height and width: [3, num_tokens].

    A text's tokens have three equal positions. Those of a picture begin where the text before it
    ends; the text after it goes on behind the larger of its sides.

    frame_steps  of each medium: how far its frames are apart in time
    Source  Wang et al. 2024, arXiv:2409.12191."""
    spans = sorted(
        (start, length, index)
        for index, medium in enumerate(media)
        for start, length in medium.spans
    )
    found = np.empty((3, num_tokens), dtype=np.int64)
    done, position = 0, 0
    for start, length, index in spans:
        found[:, done:start] = np.arange(position, position + start - done)
        position += start - done
        grid = grid_of(media[index])
        height, width = grid.height // merge, grid.width // merge
        frames = length // (height * width)
        time, row, column = np.indices((frames, height, width)).reshape(3, -1)
        found[0, start : start + length] = position + np.floor(time * frame_steps[index])
        found[1, start : start + length] = position + row
        found[2, start : start + length] = position + column
        position += max(height, width)
        done = start + length
    found[:, done:] = np.arange(position, position + num_tokens - done)
    return found
