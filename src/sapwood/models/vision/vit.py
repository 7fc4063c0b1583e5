"""Vision transformers for pictures of one size: CLIP's and SigLIP's.

Source: Radford et al. 2021, arXiv:2103.00020; Zhai et al. 2023, arXiv:2303.15343."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import Block, PatchAttention, numbered
from sapwood.models.vision.prepared import tensor_of
from sapwood.models.vision.tiles import PIXELS, TileForm
from sapwood.schema.media import Medium


def vit_block(build: Build, hf: Mapping[str, Any], size: int, eps: float) -> Block:
    """One layer, named as CLIP and SigLIP name it."""
    first, second = (LayerNorm(build, size, eps=eps) for _ in range(2))
    mlp = PlainMLP(
        build,
        size,
        integer(hf, "intermediate_size"),
        activation=Activation(activation(hf, "hidden_act", default="quick_gelu")),
        bias=True,
        names=("fc1", "fc2"),
    )
    return Block(
        norms=(first, second),
        attention=PatchAttention(build, size, integer(hf, "num_attention_heads")),
        mlp=mlp,
        names=("layer_norm1", "self_attn", "layer_norm2", "mlp"),
    )


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
        form = self.form = TileForm.read(hf, has_class=has_class)
        self.size = size
        self.side, self.num_places = form.side, form.num_places
        self._build = build
        eps = epsilon(hf, "layer_norm_eps", default=1e-5 if has_class else 1e-6)
        self._patches = build.empty(size, form.channels, form.patch, form.patch)
        self._bias = None if has_class else build.empty(size)
        self._class = build.empty(size) if has_class else None
        self._places = build.empty(self.num_places, size)
        self._first_norm = LayerNorm(build, size, eps=eps) if has_class else None
        self._layers = [vit_block(build, hf, size, eps) for _ in range(num_layers)]
        self._last_norm = LayerNorm(build, size, eps=eps) if has_last_norm else None

    def __call__(self, media: Sequence[Medium]) -> Tensor:
        """[tiles of all media, num_places, size]"""
        return self.states(media, ())[-1]

    def states(self, media: Sequence[Medium], after: Collection[int]) -> list[Tensor]:
        """The states after so many layers each, in their order, and at last the result; each
        [tiles of all media, num_places, size]."""
        pixels = torch.cat([tensor_of(medium, PIXELS) for medium in media])
        pixels = pixels.to(self._build.device, self._build.dtype)
        x = F.conv2d(pixels, self._patches, self._bias, stride=self.form.patch)
        x = x.flatten(2).transpose(1, 2)
        if self._class is not None:
            x = torch.cat((self._class.expand(len(x), 1, -1), x), dim=1)
        x = (x + self._places).flatten(0, 1)
        if self._first_norm is not None:
            x = self._first_norm(x)
        tiles = group_texts([self.num_places] * len(pixels), x.device)
        found = [x] if 0 in after else []
        for index, layer in enumerate(self._layers, 1):
            x = layer(x, tiles)
            if index in after:
                found.append(x)
        found.append(x if self._last_norm is None else self._last_norm(x))
        return [one.view(len(pixels), self.num_places, self.size) for one in found]

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
        return found | numbered("encoder.layers", self._layers)
