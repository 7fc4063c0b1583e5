"""The tower of InternVL 2.5, 3 and 3.5, under transformers' names and under its own.

Source: Chen et al. 2024, arXiv:2412.05271; Zhu et al. 2025, arXiv:2504.10479."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.norm import LayerNorm, RMSNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer, switch
from sapwood.models.vision.blocks import Block, PatchAttention, PatchNorm, Projector, numbered
from sapwood.models.vision.prepared import tensor_of
from sapwood.models.vision.tiles import PIXELS, TileForm, blocks_of
from sapwood.models.vision.tower import TileTower
from sapwood.schema.media import Medium


@dataclass(frozen=True, slots=True)
class Names:
    """Of a tower's tensors in a checkpoint.

    attention  of the projections to queries, keys, values, and to the output
    layer      of the norm, the attention, the second norm, the mlp
    scales     of the factors of both sums
    """

    tower: str
    patches: str
    class_token: str
    places: str
    layers: str
    layer: tuple[str, str, str, str]
    attention: Sequence[str]
    scales: tuple[str, str]
    projector: str
    norm: str
    linear: tuple[str, str]


TRANSFORMERS = Names(
    tower="vision_tower",
    patches="embeddings.patch_embeddings.projection",
    class_token="embeddings.cls_token",
    places="embeddings.position_embeddings",
    layers="encoder.layer",
    layer=("layernorm_before", "attention", "layernorm_after", "mlp"),
    attention=("q_proj", "k_proj", "v_proj", "projection_layer"),
    scales=("lambda_1", "lambda_2"),
    projector="multi_modal_projector",
    norm="layer_norm",
    linear=("linear_1", "linear_2"),
)
OWN = Names(
    tower="vision_model",
    patches="embeddings.patch_embedding",
    class_token="embeddings.class_embedding",
    places="embeddings.position_embedding",
    layers="encoder.layers",
    layer=("norm1", "attn", "norm2", "mlp"),
    attention=("qkv", "proj"),
    scales=("ls1", "ls2"),
    projector="mlp1",
    norm="0",
    linear=("1", "3"),
)


class InternVLTower(TileTower):
    """A picture is a row of tiles of one size; blocks of patches become one vector."""

    names = TRANSFORMERS

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
        self._layers = [self._block(build, hf, size) for _ in range(depth)]
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
            norm=(self.names.norm, LayerNorm(build, width, eps=1e-5)),
            names=self.names.linear,
        )

    def _block(self, build: Build, hf: Mapping[str, Any], size: int) -> Block:
        eps = epsilon(hf, "layer_norm_eps", default=1e-6)
        kind = RMSNorm if hf.get("norm_type") == "rms_norm" else LayerNorm
        num_heads = integer(hf, "num_attention_heads")
        norms: list[tuple[str, PatchNorm]] = []
        if switch(hf, "use_qk_norm"):
            norms = [(name, RMSNorm(build, size, eps=1e-6)) for name in ("q_norm", "k_norm")]
        return Block(
            norms=(kind(build, size, eps=eps), kind(build, size, eps=eps)),
            attention=PatchAttention(
                build,
                size,
                num_heads,
                names=self.names.attention,
                bias=switch(hf, "attention_bias"),
                out_bias=True,
                norms=norms,
                norm_size=size,
            ),
            mlp=PlainMLP(
                build,
                size,
                integer(hf, "intermediate_size"),
                activation=Activation(activation(hf, "hidden_act", default="gelu")),
                bias=True,
                names=("fc1", "fc2"),
            ),
            names=self.names.layer,
            scales=[(name, build.empty(size)) for name in self.names.scales],
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
        names = self.names
        found = {
            f"{names.patches}.weight": whole(self._patches),
            f"{names.patches}.bias": whole(self._bias),
            names.class_token: whole(self._class),
            names.places: whole(self._places),
        }
        found |= numbered(names.layers, self._layers)
        if self._last_norm is not None:
            found |= prefixed("layernorm", self._last_norm.targets())
        return prefixed(names.tower, found) | prefixed(names.projector, self._project.targets())


class InternVLChatTower(InternVLTower):
    """Under InternVL's own names, which Qianfan-OCR has too."""

    names = OWN

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        if hf_config.get("ps_version", "v2") != "v2" or hf_config.get("select_layer", -1) != -1:
            raise ConfigError(
                "of InternVLChatModel ps_version 'v2' and select_layer -1 are implemented, got "
                f"{hf_config.get('ps_version')!r} and {hf_config.get('select_layer')!r}; serve the "
                "text part with --language-only"
            )
        hf = hf_config["vision_config"]
        said = {
            "use_qk_norm": hf.get("qk_normalization"),
            "attention_bias": hf.get("qkv_bias", True),
            **{name: value for name, value in hf.items() if value is not None},
        }
        text = hf_config.get("text_config") or hf_config["llm_config"]
        super().__init__({**hf_config, "vision_config": said, "text_config": text}, build)
