"""What towers of Qwen's families have in common: grids of patches, and positions on three axes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP, PlainMLP
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import integer
from sapwood.models.vision.blocks import Block, PatchAttention, PatchNorm, Projector
from sapwood.models.vision.grids import Grid, GridForm, axis_positions, grid_of, patches_of
from sapwood.schema.media import Medium


class GridTower(ABC):
    """Patches of several frames each, of which blocks of patches become one vector.

    sections       pairs of a head's entries that a position in time, height and width turns, where
                   config.json does not say it
    has_axes       whether a token has three positions; else it has its index alone
    sees_videos    else pictures only
    """

    sections: ClassVar[Sequence[int]] = (16, 24, 24)
    has_axes = True
    sees_videos = True
    attends_both_ways = False
    over_ranks = True

    def __init__(
        self,
        hf_config: Mapping[str, Any],
        build: Build,
        *,
        size: int,
        vector_size: int,
        has_bias: bool = False,
    ) -> None:
        """A tower without layers.

        size      of a patch's state
        has_bias  whether the embedding of patches has one
        """
        hf = hf_config["vision_config"]
        patch = integer(hf, "patch_size", default=14)
        shape = (
            integer(hf, "in_channels", default=3),
            integer(hf, "temporal_patch_size", default=2),
            patch,
            patch,
        )
        self._build = build
        self._patches = build.empty(size, *shape)
        self._bias = build.empty(size) if has_bias else None
        merge = integer(hf, "spatial_merge_size", default=2)
        self._form = GridForm(merge=merge, patch_numbers=self._patches[0].numel())
        self._axis_of_pair: Tensor | None = None
        if self.has_axes:
            self._axis_of_pair = axes_of_pairs(hf_config, self.sections).to(build.device)
        self.vector_size = vector_size

    @property
    def axis_of_pair(self) -> Tensor | None:
        return self._axis_of_pair

    def why_unfit(self, medium: Medium) -> str | None:
        if medium.kind != "image" and not self.sees_videos:
            return "this model sees images, but no videos"
        return self._form.why_unfit(medium)

    def num_patches(self, medium: Medium) -> int:
        return grid_of(medium).num_patches

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        pixels = patches_of(media).to(self._build.device, self._build.dtype)
        x = F.linear(pixels, self._patches.flatten(1), self._bias)
        vectors = self._encoded(x, [grid_of(medium) for medium in media])
        return list(torch.split(vectors, [medium.num_tokens for medium in media]))

    @abstractmethod
    def _encoded(self, x: Tensor, grids: Sequence[Grid]) -> Tensor:
        """x [patches of all, size] -> [tokens of all, vector_size]"""

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        if not self.has_axes:
            return None
        steps = [self._frame_step(medium) for medium in media]
        return axis_positions(num_tokens, media, self._form.merge, frame_steps=steps)

    def _frame_step(self, medium: Medium) -> float:
        """How far its frames are apart in time, in positions."""
        return 1.0

    def patch_target(self, num_dims: int) -> Target:
        """The weight of the embedding of patches, which a checkpoint has in so many dimensions."""
        shape = self._patches.shape
        own = self._patches if num_dims == 5 else self._patches.view(shape[0], shape[1], *shape[3:])
        return whole(own)

    def targets(self) -> dict[str, Target]:
        found = {"patch_embed.proj.weight": self.patch_target(5)}
        if self._bias is not None:
            found["patch_embed.proj.bias"] = whole(self._bias)
        return prefixed("visual", found | self._own_targets())

    @abstractmethod
    def _own_targets(self) -> dict[str, Target]:
        """Of all but the embedding of patches."""

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.") if name.startswith("model.visual.") else name

    def finalize(self) -> None:
        """Nothing is left to do: each layer is packed once it is filled."""
        return


class GridBlock(Block):
    """A layer as Qwen's families name it."""

    def __init__(
        self,
        build: Build,
        size: int,
        num_heads: int,
        mlp: PlainMLP | GatedMLP,
        *,
        norm: Callable[[], PatchNorm],
        **details: Any,
    ) -> None:
        """details: of the attention"""
        super().__init__(
            norms=(norm(), norm()),
            attention=PatchAttention(build, size, num_heads, names=("qkv", "proj"), **details),
            mlp=mlp,
            names=("norm1", "attn", "norm2", "mlp"),
        )


class Merger:
    """One vector of the decoder's size from `merged` patches side by side."""

    def __init__(
        self,
        build: Build,
        size: int,
        merged: int,
        out_size: int,
        *,
        norm: tuple[str, PatchNorm],
        names: tuple[str, str] = ("mlp.0", "mlp.2"),
        norms_blocks: bool = False,
    ) -> None:
        """norm, names   of the norm, with it, and of the two linear layers
        norms_blocks  whether the norm is over a whole block; else over each patch
        """
        self._merged = merged * size
        self._norms_blocks = norms_blocks
        self._norm = norm
        sizes = (self._merged, self._merged, out_size)
        self._project = Projector(build, sizes, names=names)

    def __call__(self, x: Tensor) -> Tensor:
        """x [patches, size] -> [patches / merged, out_size]"""
        norm = self._norm[1]
        blocks = x.view(-1, self._merged)
        return self._project(norm(blocks) if self._norms_blocks else norm(x).view_as(blocks))

    def targets(self) -> dict[str, Target]:
        return prefixed(self._norm[0], self._norm[1].targets()) | self._project.targets()


def frame_lengths(grids: Sequence[Grid]) -> list[int]:
    """Patches of each frame of each medium."""
    return [grid.height * grid.width for grid in grids for _ in range(grid.frames)]


def axes_of_pairs(hf_config: Mapping[str, Any], by_default: Sequence[int]) -> Tensor:
    """Which of a token's three positions turns each pair of a head's entries: [pairs] int64"""
    text = hf_config.get("text_config") or hf_config
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    sections = rope.get("mrope_section") or list(by_default)
    if not isinstance(sections, list) or not all(isinstance(one, int) for one in sections):
        raise ConfigError(f"config.json must have numbers as 'mrope_section', got {sections!r}")
    if not rope.get("mrope_interleaved"):
        return torch.repeat_interleave(torch.arange(len(sections)) % 3, torch.tensor(sections))
    axes = torch.zeros(sum(sections), dtype=torch.int64)
    for axis in (1, 2):
        axes[axis : 3 * sections[axis] : 3] = axis
    return axes
