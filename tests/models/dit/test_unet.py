"""The U-Net against diffusers'."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.dit.unet import PictureRow, UNet
from tests.painting_peers import build_of, filled, numbers, random_weights

SIZES: dict[str, Any] = {
    "block_out_channels": (8, 16, 16),
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
    "layers_per_block": 2,
    "norm_num_groups": 4,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "sample_size": 16,
}
CASES: dict[str, dict[str, Any]] = {
    "1.5": {},
    "xl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 1),
        "attention_head_dim": (2, 4, 4),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 10 + 6 * 8,
    },
}


@cache
def peer_of(case: str) -> UNet2DConditionModel:
    model = UNet2DConditionModel(**{**SIZES, **CASES[case]}).eval()
    random_weights(model)
    return model


def a_row(peer: Any, case: str, size: tuple[int, int], length: int, seed: int) -> Any:
    row = PictureRow(
        latents=numbers(4, *size, seed=seed),
        text=numbers(length, 12, seed=seed + 1),
        timestep=900.0 - 77 * seed,
        pooled=numbers(10, seed=seed + 2) if case == "xl" else None,
        sizes=(64.0, 48.0, 0.0, 3.0, 64.0, 48.0) if case == "xl" else (),
    )
    added = None
    if case == "xl":
        added = {"text_embeds": row.pooled[None], "time_ids": torch.tensor([row.sizes])}
    timestep = torch.tensor(row.timestep)
    want = peer(row.latents[None], timestep, row.text[None], added_cond_kwargs=added).sample[0]
    return row, want


@pytest.mark.parametrize("case", CASES)
def test_rows_of_any_size_and_timestep_equal_diffusers(case: str) -> None:
    peer = peer_of(case)
    ours = filled(UNet(dict(peer.config), build_of(TorchKernels())), peer.state_dict())
    pairs = [
        a_row(peer, case, size, length, seed)
        for seed, (size, length) in enumerate([((8, 12), 5), ((7, 5), 5), ((8, 12), 5)])
    ]
    together = ours([row for row, _ in pairs])
    for got, (row, want) in zip(together, pairs, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(ours([row])[0], want, atol=1e-4, rtol=1e-4)
