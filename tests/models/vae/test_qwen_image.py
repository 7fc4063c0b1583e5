"""AutoencoderKLQwenImage against diffusers', for single pictures."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import AutoencoderKLQwenImage as Peer

from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.vae.qwen_image import AutoencoderKLQwenImage
from sapwood.pipelines.interface import result_of
from tests.painting_peers import build_of, filled, numbers, random_weights

SIZES: dict[str, Any] = {
    "base_dim": 8,
    "z_dim": 4,
    "dim_mult": [1, 2, 2, 2],
    "num_res_blocks": 1,
    "temperal_downsample": [False, True, True],
    "latents_mean": [0.1, -0.2, 0.3, 0.4],
    "latents_std": [1.5, 0.7, 1.1, 0.9],
}


def pair() -> tuple[Peer, AutoencoderKLQwenImage]:
    peer = Peer(**SIZES).eval()
    random_weights(peer)
    ours = AutoencoderKLQwenImage(dict(peer.config), build_of(TorchKernels()))
    return peer, filled(ours, peer.state_dict())


def from_model(latents: torch.Tensor) -> torch.Tensor:
    mean, deviation = (
        torch.tensor(SIZES[name])[:, None, None] for name in ("latents_mean", "latents_std")
    )
    return latents * deviation + mean


def test_pictures_and_latents_equal_diffusers() -> None:
    peer, ours = pair()
    latents = numbers(2, 4, 5, 7, seed=1)
    want = peer.decode(from_model(latents)[:, :, None]).sample[:, :, 0]
    torch.testing.assert_close(ours.decode(latents), want, atol=1e-4, rtol=1e-4)
    pictures = numbers(2, 3, 24, 40, seed=2).clamp(-1, 1)
    mode = peer.encode(pictures[:, :, None]).latent_dist.mode()[:, :, 0]
    torch.testing.assert_close(from_model(ours.encode(pictures)), mode, atol=1e-4, rtol=1e-4)


def test_tiles_equal_diffusers_tiles() -> None:
    peer, ours = pair()
    peer.enable_tiling()
    ours.tiles = True
    latents = numbers(1, 4, 33, 41, seed=1)
    want = peer.decode(from_model(latents)[:, :, None]).sample[:, :, 0]
    got = result_of(ours.decode_tiled(latents))
    torch.testing.assert_close(got, want.clamp(-1, 1), atol=1e-4, rtol=1e-4)
