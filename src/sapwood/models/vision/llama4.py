"""The tower of Llama 4. Source: Meta 2025, its model code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import PlainMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import LayerNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import integer
from sapwood.models.vision.blocks import Block, PatchAttention, numbered
from sapwood.models.vision.prepared import tensor_of
from sapwood.models.vision.tiles import PIXELS, TileForm, blocks_of
from sapwood.models.vision.tower import TileTower
from sapwood.schema.media import Medium

_EPS = 1e-5


def rotated_pairs(x: Tensor, cos_sin: Tensor) -> Tensor:
    """x [T, heads, D], each rotated by its row of cos_sin [T, D], neighbours paired"""
    cos, sin = cos_sin[:, None].chunk(2, dim=-1)
    first, second = x.float().view(*x.shape[:-1], -1, 2).unbind(-1)
    turned = torch.stack((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.flatten(-2).to(x.dtype)


class Llama4Tower(TileTower):
    """A learned vector comes after a tile's patches; blocks of these are put together."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf = hf_config["vision_config"]
        size = integer(hf, "hidden_size")
        num_heads = integer(hf, "num_attention_heads")
        self._build = build
        self.form = TileForm.read(hf, has_class=True)
        numbers = self.form.channels * self.form.patch**2
        self._patches = build.empty(size, numbers)
        self._class = build.empty(size)
        self._places = build.empty(self.form.num_places, size)
        self._norms = [LayerNorm(build, size, eps=_EPS) for _ in range(2)]
        self._layers = [
            self._block(build, hf, size, num_heads) for _ in range(integer(hf, "num_hidden_layers"))
        ]
        rope = hf.get("rope_parameters") or {}
        theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
        self._table = _rotation(self.form.side, size // num_heads, theta).to(build.device)
        self._scale = round(1 / float(hf.get("pixel_shuffle_ratio", 0.5)))
        self.tokens_per_tile = (self.form.side // self._scale) ** 2
        inner, out = integer(hf, "projector_input_dim"), integer(hf, "projector_output_dim")
        self._first = linear(build, "fc1", size * self._scale**2, inner, bias=False)
        self._second = linear(build, "fc2", inner, out, bias=False)
        self.vector_size = integer(hf_config["text_config"], "hidden_size")
        self._last = linear(build, "linear_1", out, self.vector_size, bias=False)

    def _block(self, build: Build, hf: Mapping[str, Any], size: int, num_heads: int) -> Block:
        names = ("q_proj", "k_proj", "v_proj", "o_proj")
        return Block(
            norms=(LayerNorm(build, size, eps=_EPS), LayerNorm(build, size, eps=_EPS)),
            attention=PatchAttention(build, size, num_heads, names=names, rotation=rotated_pairs),
            mlp=PlainMLP(
                build,
                size,
                integer(hf, "intermediate_size"),
                activation=Activation.GELU,
                bias=True,
                names=("fc1", "fc2"),
            ),
            names=("input_layernorm", "self_attn", "post_attention_layernorm", "mlp"),
        )

    def vectors(self, media: Sequence[Medium]) -> Tensor:
        pixels = torch.cat([tensor_of(medium, PIXELS) for medium in media])
        pixels = pixels.to(self._build.device, self._build.dtype)
        patches = F.unfold(pixels, self.form.patch, stride=self.form.patch).transpose(1, 2)
        x = F.linear(patches, self._patches)
        x = torch.cat((x, self._class.expand(len(x), 1, -1)), dim=1) + self._places
        shape, x = x.shape, self._norms[0](x.flatten(0, 1))
        tiles = group_texts([self.form.num_places] * len(pixels), x.device)
        table = self._table.repeat(len(pixels), 1)
        for layer in self._layers:
            x = layer(x, tiles, table)
        blocks = blocks_of(self._norms[1](x).view(shape)[:, :-1], self._scale)
        activate = self._build.kernels.activate
        x = activate(self._first(blocks), Activation.GELU)
        return self._last(activate(self._second(x), Activation.GELU))

    def targets(self) -> dict[str, Target]:
        adapter = self._first.targets() | self._second.targets()
        found = {
            "patch_embedding.linear.weight": whole(self._patches),
            "class_embedding": whole(self._class),
            "positional_embedding_vlm": whole(self._places),
            **prefixed("layernorm_pre", self._norms[0].targets()),
            **prefixed("layernorm_post", self._norms[1].targets()),
            **numbered("model.layers", self._layers),
            **prefixed("vision_adapter.mlp", adapter),
        }
        return prefixed("vision_model", found) | prefixed(
            "multi_modal_projector", self._last.targets()
        )


def _rotation(side: int, head_dim: int, theta: float) -> Tensor:
    """[side² + 1, head_dim] fp32: cosines, then sines; columns turn the first half of the pairs,
    rows the other. The last row, the learned vector's, turns nothing."""
    size = head_dim // 2
    frequency = 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
    column = torch.arange(side).repeat(side) + 1
    row = torch.arange(side).repeat_interleave(side) + 1
    angle = torch.cat((column[:, None] * frequency, row[:, None] * frequency), dim=-1)
    angle = torch.cat((angle, torch.zeros(1, angle.shape[1])))
    return torch.cat((angle.cos(), angle.sin()), dim=-1)
