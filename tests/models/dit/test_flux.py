"""Flux's transformer against diffusers'."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.transformers.transformer_flux import FluxTransformer2DModel

from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.axial_rope import grid
from sapwood.models.dit.flux import FluxTransformer
from sapwood.models.dit.rows import DenoisingRow
from tests.painting_peers import build_of, filled, numbers, random_weights

SIZES: dict[str, Any] = {
    "in_channels": 12,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 3,
    "joint_attention_dim": 20,
    "pooled_projection_dim": 28,
    "axes_dims_rope": (4, 4, 8),
}
CASES: dict[str, dict[str, Any]] = {
    "schnell": {},
    "dev": {"guidance_embeds": True},
    "fill": {"guidance_embeds": True, "in_channels": 20, "out_channels": 12},
}


@cache
def peer_of(case: str) -> FluxTransformer2DModel:
    model = FluxTransformer2DModel(**{**SIZES, **CASES[case]}).eval()
    random_weights(model)
    return model


def a_row(peer: Any, ours: FluxTransformer, size: tuple[int, int], text: int, seed: int) -> Any:
    """(our row, what diffusers' model predicts for it alone)"""
    height, width = size
    positions = torch.cat((torch.zeros(height * width, 1).long(), grid(height, width)), dim=1)
    row = DenoisingRow(
        latents=numbers(height * width, ours.in_channels, seed=seed),
        text=numbers(text, 20, seed=seed + 1),
        rotations=ours.rotations(text, positions),
        timestep=900.0 - 77.5 * seed,
        pooled=numbers(28, seed=seed + 2),
        guidance=2.5 + seed if ours.has_guidance else None,
    )
    guidance = torch.tensor([row.guidance]) if row.guidance is not None else None
    want = peer(
        hidden_states=row.latents[None],
        encoder_hidden_states=row.text[None],
        pooled_projections=row.pooled[None],
        timestep=torch.tensor([row.timestep / 1000]),
        img_ids=positions,
        txt_ids=torch.zeros(text, 3),
        guidance=guidance,
    ).sample[0]
    return row, want


@pytest.mark.parametrize("kernels", [ReferenceKernels(), TorchKernels()], ids=lambda k: k.name)
@pytest.mark.parametrize("case", CASES)
def test_rows_of_any_size_and_timestep_equal_diffusers(case: str, kernels: Any) -> None:
    peer = peer_of(case)
    ours = filled(FluxTransformer(dict(peer.config), build_of(kernels)), peer.state_dict())
    pairs = [
        a_row(peer, ours, size, text, seed)
        for seed, (size, text) in enumerate([((3, 5), 7), ((2, 2), 4), ((3, 5), 7), ((1, 9), 1)])
    ]
    together = ours([row for row, _ in pairs])
    for got, (row, want) in zip(together, pairs, strict=True):
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(ours([row])[0], want, atol=2e-5, rtol=1e-4)
