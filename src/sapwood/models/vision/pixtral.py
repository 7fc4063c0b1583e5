"""Pixtral's tower, in Mistral 3 and LightOnOCR with a merger of patches, and in LLaVA's form.

Source: Agrawal et al. 2024, arXiv:2410.07073."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.activations import Activation
from sapwood.kernels.texts import group_texts
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, prefixed, whole
from sapwood.models.hf_fields import activation, epsilon, integer
from sapwood.models.vision.blocks import Block, PatchAttention, Projector, numbered
from sapwood.models.vision.prepared import integers_of, tensor_of, why_malformed
from sapwood.models.vision.tower import PlainTower
from sapwood.schema.media import Medium

_EPS = 1e-5
_PIXELS, _SIZES = "pixel_values", "image_sizes"


def _block(build: Build, hf: Mapping[str, Any], size: int) -> Block:
    act = Activation(activation(hf, "hidden_act", default="gelu"))
    return Block(
        norms=(RMSNorm(build, size, eps=_EPS), RMSNorm(build, size, eps=_EPS)),
        attention=PatchAttention(
            build,
            size,
            integer(hf, "num_attention_heads"),
            names=("q_proj", "k_proj", "v_proj", "o_proj"),
            bias=False,
        ),
        mlp=GatedMLP(build, size, integer(hf, "intermediate_size"), activation=act),
        names=("attention_norm", "attention", "ffn_norm", "feed_forward"),
    )


class PixtralTower(PlainTower):
    """Pictures of any size, whole attention within each, rotated by row and column. Of LLaVA's
    form: each patch becomes a vector."""

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None:
        hf, text = hf_config["vision_config"], hf_config["text_config"]
        if hf.get("model_type") != "pixtral" or hf_config.get("vision_feature_layer", -1) != -1:
            raise ConfigError(
                "of towers in Pixtral's form the last layer of a 'pixtral' is implemented; serve "
                "the text part with --language-only"
            )
        size = integer(hf, "hidden_size")
        self._build = build
        self._patch = integer(hf, "patch_size", default=16)
        self._merge = self._merge_of(hf_config)
        self._head_dim = size // integer(hf, "num_attention_heads")
        rope = hf.get("rope_parameters") or {}
        self._theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10_000.0)
        self._channels = integer(hf, "num_channels", default=3)
        self._patches = build.empty(size, self._channels, self._patch, self._patch)
        self._first_norm = RMSNorm(build, size, eps=_EPS)
        self._layers = [_block(build, hf, size) for _ in range(integer(hf, "num_hidden_layers"))]
        self.vector_size = integer(text, "hidden_size")
        bias = hf_config.get("multimodal_projector_bias")
        act = activation(hf_config, "projector_hidden_act", default="gelu")
        self._project = Projector(
            build,
            (size, self.vector_size, self.vector_size),
            bias=self.bias_by_default if bias is None else bool(bias),
            activation=Activation(act),
        )
        self._build_merger(hf_config, build, size)

    bias_by_default = True

    def _merge_of(self, hf_config: Mapping[str, Any]) -> int:
        return 1

    def _build_merger(self, hf_config: Mapping[str, Any], build: Build, size: int) -> None:
        """Patches are not merged."""

    def _merged(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        """x [patches of all pictures, size] -> [tokens of all, size]"""
        return x

    def _projector_targets(self) -> dict[str, Target]:
        return self._project.targets()

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
        x = self._project(self._merged(x, grids))
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

    def targets(self) -> dict[str, Target]:
        found = {"patch_conv.weight": whole(self._patches)}
        found |= prefixed("ln_pre", self._first_norm.targets())
        found |= numbered("transformer.layers", self._layers)
        return prefixed("vision_tower", found) | prefixed(
            "multi_modal_projector", self._projector_targets()
        )


class Mistral3Tower(PixtralTower):
    """Blocks of patches are merged before they become vectors."""

    bias_by_default = False

    def _merge_of(self, hf_config: Mapping[str, Any]) -> int:
        return integer(hf_config, "spatial_merge_size", default=2)

    def _build_merger(self, hf_config: Mapping[str, Any], build: Build, size: int) -> None:
        eps = epsilon(hf_config["text_config"], "rms_norm_eps", default=1e-6)
        self._norm = RMSNorm(build, size, eps=eps)
        merged = size * self._merge**2
        self._merger = linear(build, "merging_layer", merged, size, bias=False)

    def _merged(self, x: Tensor, grids: Sequence[tuple[int, int]]) -> Tensor:
        pieces = torch.split(self._norm(x), [height * width for height, width in grids])
        blocks = [self._blocks(one, *grid) for one, grid in zip(pieces, grids, strict=True)]
        return self._merger(torch.cat(blocks))

    def _blocks(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [height * width, size] -> [blocks, size * merge²], a state's entries side by side"""
        merge = self._merge
        x = x.view(height // merge, merge, width // merge, merge, -1)
        return x.permute(0, 2, 4, 1, 3).flatten(2).flatten(0, 1)

    def _projector_targets(self) -> dict[str, Target]:
        found = prefixed("norm", self._norm.targets())
        return found | prefixed("patch_merger", self._merger.targets()) | self._project.targets()


class LightOnOcrTower(Mistral3Tower):
    """The same under other names (Taghadouini et al. 2026, arXiv:2601.14251)."""

    def checkpoint_name(self, name: str) -> str:
        own = name.removeprefix("model.")
        for theirs, ours in (
            ("vision_encoder.", "vision_tower."),
            ("vision_projection.", "multi_modal_projector."),
        ):
            if own.startswith(theirs):
                return ours + own.removeprefix(theirs)
        return own
