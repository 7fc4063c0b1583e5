"""The tower of Mistral 3: Pixtral's, and a merger of patches.

Source: Agrawal et al. 2024, arXiv:2410.07073."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import SeparateAttention
from sapwood.models.vision.prepared import integers_of, tensor_of, why_malformed
from sapwood.schema.media import Medium

_EPS = 1e-5
_PIXELS, _SIZES = "pixel_values", "image_sizes"


class Layer:
    """x + attention(attention_norm(x)), then y + feed_forward(ffn_norm(y))."""

    def __init__(self, build: Build, hf: Mapping[str, Any], size: int) -> None:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        self._norms = [RMSNorm(build, size, eps=_EPS) for _ in range(2)]
        self._attention = SeparateAttention(
            build, size, integer(hf, "num_attention_heads"), names=names, bias=False
        )
        act = Activation(activation(hf, "hidden_act", default="gelu"))
        inner = integer(hf, "intermediate_size")
        self._mlp = GatedMLP(build, size, inner, activation=act)

    def __call__(self, x: Tensor, pictures: Sequence[EqualTexts], cos_sin: Tensor) -> Tensor:
        x = x + self._attention(self._norms[0](x), pictures, cos_sin)
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("attention_norm", self._norms[0].targets()),
            **prefixed("ffn_norm", self._norms[1].targets()),
            **prefixed("attention", self._attention.targets()),
            **prefixed("feed_forward", once_filled(self._mlp.targets(), self._mlp.pack)),
        }


class Mistral3Tower:
    """Pictures of any size, whole attention within each, rotated by row and column."""

    vector_size: int

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf, text = hf_config["vision_config"], hf_config["text_config"]
        if hf.get("model_type") != "pixtral" or hf_config.get("vision_feature_layer", -1) != -1:
            raise ConfigError(
                "of Mistral 3's towers the last layer of a 'pixtral' is implemented; serve the "
                "text part with --language-only"
            )
        size = integer(hf, "hidden_size")
        self._build = build
        self._patch = integer(hf, "patch_size", default=16)
        self._merge = integer(hf_config, "spatial_merge_size", default=2)
        self._head_dim = size // integer(hf, "num_attention_heads")
        rope = hf.get("rope_parameters") or {}
        self._theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
        self._channels = integer(hf, "num_channels", default=3)
        self._patches = build.empty(size, self._channels, self._patch, self._patch)
        self._first_norm = RMSNorm(build, size, eps=_EPS)
        self._layers = [Layer(build, hf, size) for _ in range(integer(hf, "num_hidden_layers"))]
        self.vector_size = integer(text, "hidden_size")
        self._norm = RMSNorm(build, size, eps=epsilon(text, "rms_norm_eps", default=1e-6))
        merged = size * self._merge**2
        self._merger = linear(build, "merging_layer", merged, size, bias=False)
        bias = bool(hf_config.get("multimodal_projector_bias", False))
        self._first = linear(build, "linear_1", size, self.vector_size, bias=bias)
        self._second = linear(build, "linear_2", self.vector_size, self.vector_size, bias=bias)
        self._activation = Activation(activation(hf_config, "projector_hidden_act", default="gelu"))

    @property
    def axis_of_pair(self) -> Tensor | None:
        return None

    def why_unfit(self, medium: Medium) -> str | None:
        if medium.kind != "image":
            return "this model sees images, but no videos"
        wrong = why_malformed(medium, {_PIXELS: False, _SIZES: True})
        if wrong is not None:
            return wrong
        sizes, step = integers_of(medium, _SIZES), self._patch * self._merge
        if len(sizes) != 2 or min(sizes) < step or any(one % step for one in sizes):
            return f"image_sizes must be two multiples of {step}, got {sizes[:10]}"
        expected = (1, self._channels, *sizes)
        if medium.tensors[_PIXELS].shape != expected:
            return f"pixel_values of a prepared image must have the shape {list(expected)}"
        num_tokens = sizes[0] * sizes[1] // step**2
        if medium.num_tokens != num_tokens:
            return (
                f"an image of {sizes[0]} x {sizes[1]} pixels stands for {num_tokens} tokens of the "
                f"prompt, not for {medium.num_tokens}"
            )
        return None

    def num_patches(self, medium: Medium) -> int:
        height, width = self._grid(medium)
        return height * width

    def _grid(self, medium: Medium) -> tuple[int, int]:
        height, width = integers_of(medium, _SIZES)
        return height // self._patch, width // self._patch

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        grids = [self._grid(medium) for medium in media]
        x = self._first_norm(torch.cat([self._embedded(medium) for medium in media]))
        table = torch.cat([self._table(*grid) for grid in grids]).to(x.device)
        lengths = [height * width for height, width in grids]
        pictures = group_texts(lengths, x.device)
        for layer in self._layers:
            x = layer(x, pictures, table)
        pieces = torch.split(self._norm(x), lengths)
        blocks = [self._blocks(one, *grid) for one, grid in zip(pieces, grids, strict=True)]
        x = self._first(self._merger(torch.cat(blocks)))
        x = self._second(self._build.kernels.activate(x, self._activation))
        return list(torch.split(x, [medium.num_tokens for medium in media]))

    def _embedded(self, medium: Medium) -> Tensor:
        pixels = tensor_of(medium, _PIXELS).to(self._build.device, self._build.dtype)
        return F.conv2d(pixels, self._patches, stride=self._patch)[0].flatten(1).T.contiguous()

    def _table(self, height: int, width: int) -> Tensor:
        """[patches, head_dim]: cosines, then sines; rows turn every second frequency."""
        exponent = torch.arange(0, self._head_dim, 2, dtype=torch.float32) / self._head_dim
        frequency = 1.0 / self._theta**exponent
        row = torch.arange(height).repeat_interleave(width)
        column = torch.arange(width).repeat(height)
        angles = (row[:, None] * frequency[0::2], column[:, None] * frequency[1::2])
        angle = torch.cat(angles, dim=-1)
        return torch.cat((angle.cos(), angle.sin()), dim=-1)

    def _blocks(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [height * width, size] -> [blocks, size * merge²], a state's entries side by side"""
        merge = self._merge
        x = x.view(height // merge, merge, width // merge, merge, -1)
        return x.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        return None

    def targets(self) -> dict[str, Target]:
        found = {"patch_conv.weight": whole(self._patches)}
        found |= prefixed("ln_pre", self._first_norm.targets())
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"transformer.layers.{index}", layer.targets())
        projector = prefixed("norm", self._norm.targets())
        projector |= prefixed("patch_merger", self._merger.targets())
        projector |= self._first.targets() | self._second.targets()
        return prefixed("vision_tower", found) | prefixed("multi_modal_projector", projector)

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""
