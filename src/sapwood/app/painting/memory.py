"""How much memory pictures of a folder will take, from its configuration alone; no torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapwood.app.painting.folder import PaintingFolder, read_folder
from sapwood.diffusion.memory import PictureMemory
from sapwood.schema.config.painting import PaintingConfig

_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}

TRANSFORMER_WIDTHS = 40
"""Numbers per token of a step, in widths of the transformer: queries, keys, values, the wide half
of a feed-forward layer, what attention works with, and what is kept from one layer to the next.
tests/app/painting/test_memory.py measures them: 21 to 37."""
UNET_WIDTHS = 56
"""The same of a U-Net, per latent, in channels of its first level: 39 measured with two levels, and
6 more for what four levels keep for the way up."""
VAE_WIDTHS = 8
"""Numbers per pixel, in channels of the autoencoder's widest picture: 4.0 to 7.3 measured."""
SMALL_SIDE = 256
"""Pixels, of a picture that must fit."""
SHARE = 0.9
"""Of what is free: the rest is for texts, latents, and what is made between."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PictureShape:
    """Of the model's pictures.

    usual_side  pixels, of pictures that it was trained on
    tile_side   pixels, of what the autoencoder computes at once with tiles
    """

    pixels_per_token: int
    bytes_per_token: int
    bytes_per_pixel: int
    usual_side: int
    tile_side: int

    @property
    def usual_tokens(self) -> int:
        return self.usual_side**2 // self.pixels_per_token

    def memory(self, free_bytes: int, *, vae_tiling: bool) -> PictureMemory:
        return PictureMemory(
            free_bytes=int(max(free_bytes, 0) * SHARE),
            bytes_per_token=self.bytes_per_token,
            bytes_per_pixel=self.bytes_per_pixel,
            piece_pixels=self.tile_side**2 if vae_tiling else None,
            pixels_per_token=self.pixels_per_token,
        )


def picture_shape(folder: PaintingFolder) -> PictureShape | None:
    """None if the folder has no transformer or U-Net and autoencoder whose sizes can be read."""
    vae = _config(folder.path / "vae")
    channels: Any = vae.get("block_out_channels")
    if not channels and "base_dim" in vae:
        channels = [vae["base_dim"] * factor for factor in vae.get("dim_mult", (1, 2, 4, 4))]
    if not _are_numbers(channels):
        return None
    scale = 2 ** (len(channels) - 1)
    found = _width_and_pixels(folder.path, scale)
    if found is None:
        return None
    width, pixels_per_token, usual_side = found
    tile: Any = vae.get("sample_size", 256)
    tile = tile[0] if isinstance(tile, list) and tile else tile
    return PictureShape(
        pixels_per_token=pixels_per_token,
        bytes_per_token=width * _BYTES[folder.precision("dit")],
        bytes_per_pixel=VAE_WIDTHS * int(channels[0]) * _BYTES[folder.precision("vae")],
        usual_side=usual_side,
        tile_side=int(tile) if _are_numbers([tile]) else 256,
    )


def picture_notes(
    shape: PictureShape, memory: PictureMemory, config: PaintingConfig
) -> tuple[str, ...]:
    """What a usual picture takes beside the weights, and the largest ones that fit."""
    side = shape.usual_side
    step = memory.step_bytes(shape.usual_tokens)
    whole, tile = (
        pixels * memory.bytes_per_pixel for pixels in (side**2, min(side, shape.tile_side) ** 2)
    )
    tiles = f"{tile / 1e9:.2f} GB tile by tile (--vae-tiling)"
    decode = tiles if config.vae_tiling else f"{whole / 1e9:.2f} GB whole, {tiles}"
    return (
        f"a picture of {side}x{side} takes about {step / 1e9:.2f} GB for a step of one pass, and "
        f"to become pixels {decode}; {memory.free_bytes / 1e9:.2f} GB are for that",
        f"pictures of up to {min(memory.max_pixels, config.max_picture_pixels)} pixels "
        f"(--max-picture-pixels is {config.max_picture_pixels}), and "
        f"{min(memory.max_tokens, config.max_step_tokens)} tokens a step "
        f"(--max-step-tokens is {config.max_step_tokens})",
    )


def no_room(shape: PictureShape, memory: PictureMemory) -> str | None:
    """Why no picture can be drawn: not even a small one fits beside the weights."""
    if memory.max_pixels >= SMALL_SIDE**2:
        return None
    need = max(
        memory.step_bytes(SMALL_SIDE**2 // shape.pixels_per_token),
        memory.piece_bytes(SMALL_SIDE**2),
    )
    return (
        f"beside the weights {memory.free_bytes / 1e9:.2f} GB are free, but a picture of "
        f"{SMALL_SIDE}x{SMALL_SIDE} takes about {need / 1e9:.2f} GB while it is drawn; choose "
        "smaller weights (--dit-precision bf16, --dit-quantization fp8, --vae-precision bf16)"
    )


def other_precisions(folder: PaintingFolder, config: PaintingConfig) -> tuple[str, ...]:
    """What the weights would take in other precisions, all components together."""
    sizes: list[str] = []
    for precision in ("fp32", "bf16"):
        other = replace(
            config,
            dit_precision=precision,
            text_encoder_precisions=precision,
            vae_precision=precision,
            dit_quantization="none",
        )
        sizes.append(f"{_total(folder, other)} in {precision}")
    for kind in ("fp8", "w4a8"):
        other = replace(config, dit_quantization=kind)
        sizes.append(f"{_total(folder, other)} with --dit-quantization {kind}")
    return (f"all weights would take {', '.join(sizes)}",)


def _total(folder: PaintingFolder, config: PaintingConfig) -> str:
    return f"{read_folder(folder.path, config).num_bytes / 1e9:.2f} GB"


def _width_and_pixels(path: Path, scale: int) -> tuple[int, int, int] | None:
    """(numbers per token of a step, pixels per token, side of a usual picture)"""
    unet = _config(path / "unet")
    levels: Any = unet.get("block_out_channels")
    if _are_numbers(levels):
        side: Any = unet.get("sample_size")
        latents = int(side) if _are_numbers([side]) else 64
        return UNET_WIDTHS * int(levels[0]), scale * scale, latents * scale
    transformer = _config(path / "transformer")
    width: Any = transformer.get("dim")
    if not _are_numbers([width]):
        sizes: list[Any] = [
            transformer.get(name) for name in ("num_attention_heads", "attention_head_dim")
        ]
        if not _are_numbers(sizes):
            return None
        width = math.prod(sizes)
    return TRANSFORMER_WIDTHS * int(width), 4 * scale * scale, 128 * scale


def _config(folder: Path) -> Mapping[str, Any]:
    """config.json of a component; nothing if it is not there or no object: loading says so."""
    try:
        found = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _are_numbers(values: Any) -> bool:
    return (
        isinstance(values, list)
        and bool(values)
        and all(
            isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**20
            for value in values
        )
    )
