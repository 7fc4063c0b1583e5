"""Vision transformers for pictures of one size: CLIP's and SigLIP's.

Source: Radford et al. 2021, arXiv:2103.00020; Zhai et al. 2023, arXiv:2303.15343."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import SeparateAttention
from sapwood.models.vision.prepared import tensor_of
from sapwood.models.vision.tiles import PIXELS, TileForm
from sapwood.schema.media import Medium


class ViTLayer:
    """x + attention(layer_norm1(x)), then y + mlp(layer_norm2(y))."""

    def __init__(self, build: Build, hf: Mapping[str, Any], size: int, eps: float) -> None:
        self._norms = [LayerNorm(build, size, eps=eps) for _ in range(2)]
        self._attention = SeparateAttention(build, size, integer(hf, "num_attention_heads"))
        self._mlp = PlainMLP(
            build,
            size,
            integer(hf, "intermediate_size"),
            activation=Activation(activation(hf, "hidden_act", default="quick_gelu")),
            bias=True,
            names=("fc1", "fc2"),
        )

    def __call__(self, x: Tensor, pictures: Sequence[EqualTexts]) -> Tensor:
        x = x + self._attention(self._norms[0](x), pictures)
        return x + self._mlp(self._norms[1](x))

    def targets(self) -> dict[str, Target]:
        return {
            **prefixed("layer_norm1", self._norms[0].targets()),
            **prefixed("layer_norm2", self._norms[1].targets()),
            **prefixed("self_attn", self._attention.targets()),
            **prefixed("mlp", once_filled(self._mlp.targets(), self._mlp.pack)),
        }


class ViT:
    """From tiles, pictures of one size, to a state per patch.

    has_class  whether a learned vector comes before the patches, and a norm after the embeddings;
               else the embedding of patches has a bias
    """

    def __init__(
        self,
        build: Build,
        hf: Mapping[str, Any],
        *,
        num_layers: int,
        has_class: bool,
        has_last_norm: bool,
    ) -> None:
        """num_layers: how many of the layers are computed"""
        size = integer(hf, "hidden_size")
        form = self._form = TileForm.read(hf, has_class=has_class)
        self.size = size
        self.side, self.num_places = form.side, form.num_places
        self._build = build
        eps = epsilon(hf, "layer_norm_eps", default=1e-5 if has_class else 1e-6)
        self._patches = build.empty(size, form.channels, form.patch, form.patch)
        self._bias = None if has_class else build.empty(size)
        self._class = build.empty(size) if has_class else None
        self._places = build.empty(self.num_places, size)
        self._first_norm = LayerNorm(build, size, eps=eps) if has_class else None
        self._layers = [ViTLayer(build, hf, size, eps) for _ in range(num_layers)]
        self._last_norm = LayerNorm(build, size, eps=eps) if has_last_norm else None

    def why_unfit(self, medium: Medium, tokens_per_tile: int) -> str | None:
        """As TileForm.why_unfit."""
        return self._form.why_unfit(medium, tokens_per_tile)

    def num_patches(self, medium: Medium) -> int:
        return self._form.num_patches(medium)

    def __call__(self, media: Sequence[Medium]) -> Tensor:
        """[tiles of all media, num_places, size]"""
        pixels = torch.cat([tensor_of(medium, PIXELS) for medium in media])
        pixels = pixels.to(self._build.device, self._build.dtype)
        x = F.conv2d(pixels, self._patches, self._bias, stride=self._form.patch)
        x = x.flatten(2).transpose(1, 2)
        if self._class is not None:
            x = torch.cat((self._class.expand(len(x), 1, -1), x), dim=1)
        x = (x + self._places).flatten(0, 1)
        if self._first_norm is not None:
            x = self._first_norm(x)
        tiles = group_texts([self.num_places] * len(pixels), x.device)
        for layer in self._layers:
            x = layer(x, tiles)
        if self._last_norm is not None:
            x = self._last_norm(x)
        return x.view(len(pixels), self.num_places, self.size)

    def targets(self) -> dict[str, Target]:
        found = {
            "embeddings.patch_embedding.weight": whole(self._patches),
            "embeddings.position_embedding.weight": whole(self._places),
        }
        if self._bias is not None:
            found["embeddings.patch_embedding.bias"] = whole(self._bias)
        if self._class is not None:
            found["embeddings.class_embedding"] = whole(self._class)
        if self._first_norm is not None:
            found |= prefixed("pre_layrnorm", self._first_norm.targets())
        if self._last_norm is not None:
            found |= prefixed("post_layernorm", self._last_norm.targets())
        for index, layer in enumerate(self._layers):
            found |= prefixed(f"encoder.layers.{index}", layer.targets())
        return found
