"""The tower of LFM2-VL: SigLIP 2's for any shape, whose patches are put together by blocks.

Source: Tschannen et al. 2025, arXiv:2502.14786; Liquid AI 2025, arXiv:2511.23404."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import isqrt
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import Projector, numbered
from sapwood.models.vision.places import between
from sapwood.models.vision.prepared import integers_of, tensor_of, why_malformed
from sapwood.models.vision.tower import PlainTower
from sapwood.models.vision.vit import vit_block
from sapwood.schema.media import Medium

_PIXELS, _SHAPES = "pixel_values", "spatial_shapes"


class Lfm2VLTower(PlainTower):
    """A medium is a row of tiles, each of some rows and columns of patches (spatial_shapes), filled
    up to the number of patches of the largest."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = {"hidden_act": "gelu_pytorch_tanh", **hf_config["vision_config"]}
        size = integer(hf, "hidden_size")
        eps = epsilon(hf, "layer_norm_eps", default=1e-6)
        self._build = build
        self._numbers = integer(hf, "num_channels", default=3) * integer(hf, "patch_size") ** 2
        self._patches = build.empty(size, self._numbers)
        self._bias = build.empty(size)
        self._places = build.empty(integer(hf, "num_patches", default=256), size)
        depth = integer(hf, "num_hidden_layers")
        self._layers = [vit_block(build, hf, size, eps) for _ in range(depth)]
        self._last_norm = LayerNorm(build, size, eps=eps)
        self._scale = integer(hf_config, "downsample_factor", default=2)
        width = size * self._scale**2
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        has_norm = hf_config.get("projector_use_layernorm", True)
        self._project = Projector(
            build,
            (width, integer(hf_config, "projector_hidden_size", default=2560), self.vector_size),
            activation=Activation(activation(hf_config, "projector_hidden_act", default="gelu")),
            bias=hf_config.get("projector_bias", True),
            norm=("layer_norm", LayerNorm(build, width, eps=1e-5)) if has_norm else None,
        )

    def why_unfit(self, medium: Medium) -> str | None:
        if medium.kind != "image":
            return "this model sees images, but no videos"
        wrong = why_malformed(medium, {_PIXELS: False, _SHAPES: True})
        if wrong is not None:
            return wrong
        shape = medium.tensors[_PIXELS].shape
        if len(shape) != 3 or shape[2] != self._numbers:
            return f"pixel_values must have the shape [tiles, patches, {self._numbers}]"
        if medium.tensors[_SHAPES].shape != (shape[0], 2):
            return f"spatial_shapes must have the shape [{shape[0]}, 2]"
        sizes = self._sizes(medium)
        if any(min(one) < 1 or one[0] % self._scale or one[1] % self._scale for one in sizes):
            return f"spatial_shapes must be multiples of {self._scale}"
        if any(rows * columns > shape[1] for rows, columns in sizes):
            return "spatial_shapes show more patches than pixel_values has"
        count = sum(rows * columns for rows, columns in sizes) // self._scale**2
        if medium.num_tokens != count:
            return f"this image stands for {count} tokens of the prompt, not {medium.num_tokens}"
        return None

    def _sizes(self, medium: Medium) -> list[tuple[int, int]]:
        numbers = integers_of(medium, _SHAPES)
        return list(zip(numbers[::2], numbers[1::2], strict=True))

    def num_patches(self, medium: Medium) -> int:
        return sum(rows * columns for rows, columns in self._sizes(medium))

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        sizes = [size for medium in media for size in self._sizes(medium)]
        lengths = [rows * columns for rows, columns in sizes]
        tiles = [tile for medium in media for tile in tensor_of(medium, _PIXELS)]
        pixels = torch.cat([one[:count] for one, count in zip(tiles, lengths, strict=True)])
        pixels = pixels.to(self._build.device, self._build.dtype)
        x = F.linear(pixels, self._patches, self._bias)
        x = x + torch.cat([self._places_of(*size) for size in sizes])
        pictures = group_texts(lengths, x.device)
        for layer in self._layers:
            x = layer(x, pictures)
        pieces = torch.split(self._last_norm(x), lengths)
        blocks = [self._blocks(one, *size) for one, size in zip(pieces, sizes, strict=True)]
        vectors = self._project(torch.cat(blocks))
        return list(vectors.split_with_sizes([medium.num_tokens for medium in media]))

    def _places_of(self, rows: int, columns: int) -> Tensor:
        table = self._places.view(isqrt(len(self._places)), -1, self._places.shape[1])
        return between(table, rows, columns, antialias=True).flatten(0, 1)

    def _blocks(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """x [rows * columns, size] -> [tokens, scale² * size]"""
        scale = self._scale
        x = x.view(rows // scale, scale, columns // scale, scale, -1)
        return x.transpose(1, 2).flatten(2).flatten(0, 1)

    def targets(self) -> dict[str, Target]:
        found = {
            "embeddings.patch_embedding.weight": whole(self._patches),
            "embeddings.patch_embedding.bias": whole(self._bias),
            "embeddings.position_embedding.weight": whole(self._places),
            **numbered("encoder.layers", self._layers),
            **prefixed("post_layernorm", self._last_norm.targets()),
        }
        return prefixed("vision_tower", found) | prefixed(
            "multi_modal_projector", self._project.targets()
        )

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        return own.replace("vision_tower.vision_model.", "vision_tower.", 1)
