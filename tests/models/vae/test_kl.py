"""AutoencoderKL against diffusers'."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Peer

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.vae.kl import AutoencoderKL
from tests.painting_peers import build_of, filled, numbers, random_weights

SIZES: dict[str, Any] = {
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "block_out_channels": (8, 8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 32,
}
CASES: dict[str, dict[str, Any]] = {
    "stable diffusion": {},
    "flux": {
        "use_quant_conv": False,
        "use_post_quant_conv": False,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
    },
    "without attention": {"mid_block_add_attention": False, "layers_per_block": 2},
}


def pair_of(case: str) -> tuple[Peer, AutoencoderKL]:
    peer = Peer(**{**SIZES, **CASES[case]}).eval()
    random_weights(peer)
    ours = AutoencoderKL(dict(peer.config), build_of(TorchKernels()))
    return peer, filled(ours, peer.state_dict())


def from_model(peer: Peer, latents: torch.Tensor) -> torch.Tensor:
    shift = peer.config["shift_factor"] or 0.0
    return latents / peer.config["scaling_factor"] + shift


@pytest.mark.parametrize("case", CASES)
def test_pictures_and_latents_equal_diffusers(case: str) -> None:
    peer, ours = pair_of(case)
    latents = numbers(2, 4, 5, 7, seed=1)
    want = peer.decode(from_model(peer, latents)).sample
    torch.testing.assert_close(ours.decode(latents), want, atol=1e-4, rtol=1e-4)
    pictures = numbers(2, 3, 20, 28, seed=2).clamp(-1, 1)
    drawn = peer.encode(pictures).latent_dist.sample(torch.Generator().manual_seed(3))
    got = ours.encode(pictures, torch.Generator().manual_seed(3))
    torch.testing.assert_close(from_model(peer, got), drawn, atol=1e-4, rtol=1e-4)
    got = ours.encode(pictures)
    mode = peer.encode(pictures).latent_dist.mode()
    torch.testing.assert_close(from_model(peer, got), mode, atol=1e-4, rtol=1e-4)


def test_tiles_equal_diffusers_tiles() -> None:
    peer, ours = pair_of("stable diffusion")
    peer.enable_tiling()
    ours.tiles = True
    latents = numbers(1, 4, 13, 19, seed=1)
    want = peer.decode(from_model(peer, latents)).sample
    num_tiles, got = run(ours.decode_tiled(latents))
    assert num_tiles == 3 * 4
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    pictures = numbers(1, 3, 44, 60, seed=2)
    mode = peer.encode(pictures).latent_dist.mode()
    got = run(ours.encode_tiled(pictures))[1]
    torch.testing.assert_close(from_model(peer, got), mode, atol=1e-4, rtol=1e-4)


def test_a_small_picture_is_one_tile() -> None:
    _, ours = pair_of("flux")
    ours.tiles = True
    latents = numbers(1, 4, 8, 6, seed=1)
    num_tiles, got = run(ours.decode_tiled(latents))
    assert num_tiles == 0
    torch.testing.assert_close(got, ours.decode(latents))


def run(work: Any) -> tuple[int, torch.Tensor]:
    count = 0
    while True:
        try:
            next(work)
        except StopIteration as end:
            return count, end.value
        count += 1
