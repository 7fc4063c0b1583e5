"""The tower of InternVL 2.5, 3 and 3.5, under transformers' names and under its own.

Source: Chen et al. 2024, arXiv:2412.05271; Zhu et al. 2025, arXiv:2504.10479."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import NamedLinear, linear
from sapwood.layers.norm import LayerNorm, RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer, switch
from sapwood.models.vision.blocks import PatchNorm, Projector, numbered
from sapwood.models.vision.prepared import tensor_of
from sapwood.models.vision.tiles import PIXELS, TileForm, blocks_of
from sapwood.models.vision.tower import TileTower
from sapwood.schema.media import Medium


class Layer:
    """x + a * attention(norm(x)), then y + b * mlp(norm(y)), where a and b are learned."""

    def __init__(self, build: Build, hf: Mapping[str, Any], size: int) -> None:
        eps = epsilon(hf, "layer_norm_eps", default=1e-6)
        norm = RMSNorm if hf.get("norm_type") == "rms_norm" else LayerNorm
        self._norms: list[PatchNorm] = [norm(build, size, eps=eps) for _ in range(2)]
        self._num_heads = integer(hf, "num_attention_heads")
        self._head_dim = size // self._num_heads
        names = dict.fromkeys(("q_proj", "k_proj", "v_proj"), size)
        self._qkv = NamedLinear(build, size, names, bias=switch(hf, "attention_bias"))
        self._out = linear(build, "projection_layer", size, size)
        self._head_norms: list[RMSNorm] = []
        if switch(hf, "use_qk_norm"):
            self._head_norms = [RMSNorm(build, size, eps=1e-6) for _ in range(2)]
        self._scales = [build.empty(size) for _ in range(2)]
        self._mlp = PlainMLP(
            build,
            size,
            integer(hf, "intermediate_size"),
            activation=Activation(activation(hf, "hidden_act", default="gelu")),
            bias=True,
            names=("fc1", "fc2"),
        )
        self._kernels = build.kernels

    def __call__(self, x: Tensor, tiles: Sequence[EqualTexts]) -> Tensor:
        x = x + self._scales[0] * self._attended(self._norms[0](x), tiles)
        return x + self._scales[1] * self._mlp(self._norms[1](x))

    def _attended(self, x: Tensor, tiles: Sequence[EqualTexts]) -> Tensor:
        q, k, v = self._qkv.split(x)
        if self._head_norms:
            q, k = (
                norm(one.contiguous()) for norm, one in zip(self._head_norms, (q, k), strict=True)
            )
        heads = (len(x), self._num_heads, self._head_dim)
        attend = self._kernels.bidirectional_attention
        q, k, v = (one.reshape(heads) for one in (q, k, v))
        return self._out(attend(q, k, v, tiles, self._head_dim**-0.5).flatten(1))

    def targets(self) -> dict[str, Target]:
        attention = self._qkv.targets() | self._out.targets()
        for name, norm in zip(("q_norm", "k_norm"), self._head_norms, strict=False):
            attention |= prefixed(name, norm.targets())
        return {
            **prefixed("layernorm_before", self._norms[0].targets()),
            **prefixed("layernorm_after", self._norms[1].targets()),
            **prefixed("attention", attention),
            **prefixed("mlp", once_filled(self._mlp.targets(), self._mlp.pack)),
            "lambda_1": whole(self._scales[0]),
            "lambda_2": whole(self._scales[1]),
        }


class InternVLTower(TileTower):
    """A picture is a row of tiles of one size; blocks of patches become one vector."""

    layers_name = "encoder.layer"

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size = integer(hf, "hidden_size")
        self.form = TileForm.read(hf, has_class=True)
        self._build = build
        self._patches = build.empty(size, self.form.channels, *[self.form.patch] * 2)
        self._bias = build.empty(size)
        self._class = build.empty(1, 1, size)
        self._places = build.empty(1, self.form.num_places, size)
        if hf.get("use_absolute_position_embeddings") is False or hf.get("use_mask_token"):
            raise ConfigError(
                "towers of InternVL without learned positions, or with a mask token, are not "
                "implemented; serve the text part with --language-only"
            )
        depth = integer(hf, "num_hidden_layers")
        layer = hf_config.get("vision_feature_layer", -1)
        if layer != -1 or hf_config.get("vision_feature_select_strategy", "default") != "default":
            raise ConfigError(
                "of InternVL's towers the last layer's patches are implemented, not "
                f"vision_feature_layer {layer!r}; serve the text part with --language-only"
            )
        self._layers = [Layer(build, hf, size) for _ in range(depth)]
        eps = epsilon(hf, "layer_norm_eps", default=1e-6)
        pools = hf.get("use_mean_pooling", True)
        self._last_norm = None if pools else LayerNorm(build, size, eps=eps)
        self._scale = round(1 / float(hf_config.get("downsample_ratio", 0.5)))
        self.tokens_per_tile = (self.form.side // self._scale) ** 2
        width = size * self._scale**2
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        self._project = Projector(
            build,
            (width, self.vector_size, self.vector_size),
            activation=Activation(activation(hf_config, "projector_hidden_act", default="gelu")),
            norm=("layer_norm", LayerNorm(build, width, eps=1e-5)),
        )

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        pixels = torch.cat([tensor_of(medium, PIXELS) for medium in media])
        pixels = pixels.to(self._build.device, self._build.dtype)
        x = F.conv2d(pixels, self._patches, self._bias, stride=self.form.patch)
        x = x.flatten(2).transpose(1, 2)
        x = torch.cat((self._class.expand(len(x), 1, -1), x), dim=1) + self._places
        tiles = group_texts([x.shape[1]] * len(x), x.device)
        shape, x = x.shape, x.flatten(0, 1)
        for layer in self._layers:
            x = layer(x, tiles)
        if self._last_norm is not None:
            x = self._last_norm(x)
        return self._project(blocks_of(x.view(shape)[:, 1:], self._scale))

    def targets(self) -> dict[str, Target]:
        found = {
            "embeddings.patch_embeddings.projection.weight": whole(self._patches),
            "embeddings.patch_embeddings.projection.bias": whole(self._bias),
            "embeddings.cls_token": whole(self._class),
            "embeddings.position_embeddings": whole(self._places),
        }
        found |= numbered(self.layers_name, self._layers)
        if self._last_norm is not None:
            found |= prefixed("layernorm", self._last_norm.targets())
        return prefixed("vision_tower", found) | prefixed(
            "multi_modal_projector", self._project.targets()
        )


class QianfanTower(InternVLTower):
    """Of Qianfan-OCR: InternVL's, with a norm of the last states."""

    layers_name = "layers"

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        vision = {**hf_config["vision_config"], "use_mean_pooling": False}
        super().__init__({**hf_config, "vision_config": vision}, build)
