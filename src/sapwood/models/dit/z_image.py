"""Z-Image's transformer, Turbo's too. Source: Z-Image Team 2025, arXiv:2511.22699.

Text and picture go through the same layers, after a few layers of their own (refiners). Both are
filled up with learned tokens to a multiple of 32."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.texts import EqualTexts, group_texts
from sapwood.layers.adaptive import Modulation, add_gated, modulated_norm, scaled_norm
from sapwood.layers.axial_rope import AxialRope, grid
from sapwood.layers.build import Build
from sapwood.layers.mlp import GatedMLP
from sapwood.layers.named_linear import linear
from sapwood.layers.norm import RMSNorm
from sapwood.layers.targets import Target, once_filled, prefixed, whole
from sapwood.layers.timesteps import EmbeddingMLP, sinusoids
from sapwood.layers.token_rows import TokenRows, packed
from sapwood.models.dit.joint import HeadSizes, Projections, whole_number
from sapwood.models.dit.rows import DenoisingRow, column

MULTIPLE = 32
CONDITION, FREQUENCIES, CONDITION_HIDDEN = 256, 256, 1024
HEAD_NORM_EPS, LAST_NORM_EPS = 1e-5, 1e-6


class ZImageBlock:
    """x + gate * norm(attention(scale * norm(x))), and the same with a feed-forward layer."""

    def __init__(
        self, build: Build, heads: HeadSizes, *, eps: float, condition: int | None
    ) -> None:
        """condition: size of the vector of the timestep; None: the block has no scales and gates"""
        size = heads.width
        self._kernels = build.kernels
        self._eps = eps
        self._scale = heads.head_dim**-0.5
        self._numbers = None
        if condition is not None:
            self._numbers = Modulation(
                build, "adaLN_modulation.0", condition, size, 4, activates=False
            )
        self._projections = Projections(
            build,
            size,
            heads,
            names=("to_q", "to_k", "to_v"),
            norms=("norm_q", "norm_k"),
            bias=False,
        )
        self._out = linear(build, "to_out.0", size, size, bias=False)
        self._mlp = GatedMLP(build, size, int(size / 3 * 8), names=("w1", "w3", "w2"))
        names = ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2")
        self._norms = {name: RMSNorm(build, size, eps=eps) for name in names}

    def __call__(
        self,
        x: Tensor,
        rows: TokenRows,
        groups: list[EqualTexts],
        rotations: Tensor,
        condition: Tensor | None = None,
    ) -> None:
        """x [T, size], changed in place; condition [R, size of the vector]"""
        if self._numbers is None or condition is None:
            normed = self._norms["attention_norm1"](x)
            x += self._norms["attention_norm2"](self._attend(normed, groups, rotations))
            x += self._norms["ffn_norm2"](self._mlp(self._norms["ffn_norm1"](x)))
            return
        scale, gate, mlp_scale, mlp_gate = self._numbers(condition)
        normed = self._scaled("attention_norm1", x, rows, scale)
        mixed = self._norms["attention_norm2"](self._attend(normed, groups, rotations))
        add_gated(x, gate.tanh(), mixed, rows)
        expanded = self._mlp(self._scaled("ffn_norm1", x, rows, mlp_scale))
        add_gated(x, mlp_gate.tanh(), self._norms["ffn_norm2"](expanded), rows)

    def _scaled(self, name: str, x: Tensor, rows: TokenRows, scale: Tensor) -> Tensor:
        weight = self._norms[name].weight
        return scaled_norm(self._kernels, x, rows, weight=weight, scale=scale, eps=self._eps)

    def _attend(self, x: Tensor, groups: list[EqualTexts], rotations: Tensor) -> Tensor:
        q, k, v, _ = self._projections(x, rotations)
        mixed = self._kernels.bidirectional_attention(q, k, v, groups, self._scale)
        return self._out(mixed.flatten(1))

    def targets(self) -> dict[str, Target]:
        attention = self._projections.targets() | self._out.targets()
        found = prefixed("attention", attention)
        mlp = once_filled(self._mlp.targets(), self._mlp.pack)
        found |= prefixed("feed_forward", mlp)
        for name, norm in self._norms.items():
            found |= prefixed(name, norm.targets())
        return found if self._numbers is None else found | self._numbers.targets()


class ZImageTransformer:
    """Rows of picture and text tokens to the velocity of each picture token."""

    def __init__(self, config: Mapping[str, Any], build: Build) -> None:
        """config: config.json of the component"""
        _refuse_what_is_not_implemented(config)
        size = whole_number(config, "dim", 3840)
        num_heads = whole_number(config, "n_heads", 30)
        has_norms = bool(config.get("qk_norm", True))
        heads = HeadSizes(
            num_heads=num_heads,
            head_dim=size // num_heads,
            norm_eps=HEAD_NORM_EPS if has_norms else None,
        )
        axes = tuple(config.get("axes_dims", (32, 48, 48)))
        if sum(axes) != heads.head_dim:
            raise ConfigError(f"axes_dims {list(axes)} must add up to {heads.head_dim}, a head")
        eps = float(config.get("norm_eps", 1e-5))
        condition = min(size, CONDITION)
        self.in_channels = whole_number(config, "in_channels", 16)
        self._build = build
        self._time_scale = float(config.get("t_scale", 1000.0))
        self._rope = AxialRope(axes, float(config.get("rope_theta", 256.0)), build.device)
        self._timestep = EmbeddingMLP(
            build, FREQUENCIES, CONDITION_HIDDEN, out_size=condition, names=("mlp.0", "mlp.2")
        )
        text_size = whole_number(config, "cap_feat_dim", 2560)
        self._text_norm = RMSNorm(build, text_size, eps=eps)
        self._text_in = linear(build, "cap_embedder.1", text_size, size)
        token = 4 * self.in_channels
        self._picture_in = linear(build, "all_x_embedder.2-1", token, size)
        self._picture_pad, self._text_pad = build.empty(1, size), build.empty(1, size)

        def blocks(count: int, condition: int | None) -> list[ZImageBlock]:
            return [ZImageBlock(build, heads, eps=eps, condition=condition) for _ in range(count)]

        num_refiners = whole_number(config, "n_refiner_layers", 2)
        self._picture_refiner = blocks(num_refiners, condition)
        self._text_refiner = blocks(num_refiners, None)
        self._layers = blocks(whole_number(config, "n_layers", 30), condition)
        name = "all_final_layer.2-1"
        self._last_numbers = Modulation(build, f"{name}.adaLN_modulation.1", condition, size, 1)
        self._out = linear(build, f"{name}.linear", size, token)

    def refined(self, text: Tensor) -> Tensor:
        """text [L, text size], a prompt's states -> [L', size], filled up: a row's text. It does
        not depend on the timestep, so that a prompt needs it once."""
        x = self._text_in(self._text_norm(text))
        x = torch.cat((x, self._text_pad.expand(-len(x) % MULTIPLE, -1)))
        rotations = self._rope(_text_positions(len(x)))
        rows = TokenRows((len(x),))
        groups = group_texts(rows.lengths, self._build.device)
        for block in self._text_refiner:
            block(x, rows, groups, rotations)
        return x

    def rotations(self, text_length: int, size: tuple[int, int]) -> Tensor:
        """Of a row's tokens: picture, what fills it up, and refined text. size: of the patches"""
        places = grid(*size)
        first = places.new_full((len(places), 1), text_length + 1)
        picture = torch.cat((first, places), dim=1)
        filling = places.new_zeros(-len(places) % MULTIPLE, 3)
        return self._rope(torch.cat((picture, filling, _text_positions(text_length))))

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """As DiffusionTransformer: the velocity from the picture to the noise."""
        device = self._build.device
        condition = self._condition(rows)
        own = TokenRows.of([row.latents for row in rows])
        embedded = own.split(self._picture_in(packed([row.latents for row in rows])))
        filled = [
            torch.cat((x, self._picture_pad.expand(-len(x) % MULTIPLE, -1))) for x in embedded
        ]
        pictures = TokenRows.of(filled)
        x = packed(filled)
        spans = zip(pictures.lengths, rows, strict=True)
        rotations = packed([row.rotations[:length] for length, row in spans])
        groups = group_texts(pictures.lengths, device)
        for block in self._picture_refiner:
            block(x, pictures, groups, rotations, condition)
        pairs = zip(pictures.split(x), rows, strict=True)
        joined = [torch.cat((picture, row.text)) for picture, row in pairs]
        joint = TokenRows.of(joined)
        x = packed(joined)
        rotations = packed([row.rotations for row in rows])
        groups = group_texts(joint.lengths, device)
        for block in self._layers:
            block(x, joint, groups, rotations, condition)
        wanted = [
            all_of[:length] for all_of, length in zip(joint.split(x), own.lengths, strict=True)
        ]
        (scale,) = self._last_numbers(condition)
        normed = modulated_norm(
            self._build.kernels,
            packed(wanted),
            own,
            shift=torch.zeros_like(scale),
            scale=scale,
            eps=LAST_NORM_EPS,
        )
        return list(own.split(self._out(normed).neg_()))

    def _condition(self, rows: Sequence[DenoisingRow]) -> Tensor:
        """[R, condition]; time runs from 0, all noise, to t_scale"""
        timesteps = column([row.timestep for row in rows], self._build.device)
        times = (1000.0 - timesteps) / 1000.0 * self._time_scale
        return self._timestep(sinusoids(times, FREQUENCIES).to(self._build.dtype))

    def targets(self) -> dict[str, Target]:
        found = prefixed("t_embedder", self._timestep.targets())
        found |= prefixed("cap_embedder.0", self._text_norm.targets())
        for layer in (self._text_in, self._picture_in, self._last_numbers, self._out):
            found |= layer.targets()
        found["x_pad_token"] = whole(self._picture_pad)
        found["cap_pad_token"] = whole(self._text_pad)
        stacks = {
            "noise_refiner": self._picture_refiner,
            "context_refiner": self._text_refiner,
            "layers": self._layers,
        }
        for name, blocks in stacks.items():
            for index, block in enumerate(blocks):
                found |= prefixed(f"{name}.{index}", block.targets())
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()


def _text_positions(length: int) -> Tensor:
    """[length, 3]: text has the places 1, 2, … on the first axis"""
    positions = torch.zeros(length, 3, dtype=torch.int64)
    positions[:, 0] = torch.arange(1, length + 1)
    return positions


def _refuse_what_is_not_implemented(config: Mapping[str, Any]) -> None:
    patches = (
        tuple(config.get("all_patch_size", (2,))),
        tuple(config.get("all_f_patch_size", (1,))),
    )
    if patches != ((2,), (1,)):
        raise ConfigError(f"Z-Image's patches must be (2,) and (1,), got {patches}")
    if config.get("siglip_feat_dim"):
        raise ConfigError(
            "Z-Image Omni, which looks at pictures through SigLIP, is not implemented"
        )
    heads, kv_heads = config.get("n_heads", 30), config.get("n_kv_heads", 30)
    if heads != kv_heads:
        raise ConfigError(f"Z-Image's n_kv_heads must be its n_heads {heads}, got {kv_heads}")
