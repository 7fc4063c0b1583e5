"""Tiny random components of diffusers, and ours with the same weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sapwood.kernels.interface import Kernels
from sapwood.layers.build import Build
from sapwood.models.loader.assign import load_weights

CPU = torch.device("cpu")


def random_weights(model: torch.nn.Module, seed: int = 0) -> None:
    """Numbers with which no part of the model vanishes: gates and norms among them."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() == 1 and "norm" in name and name.endswith("weight"):
            parameter.data = 1.0 + 0.2 * noise
        elif parameter.dim() == 1:
            parameter.data = 0.2 * noise
        else:
            parameter.data = noise * parameter[0].numel() ** -0.5


def build_of(kernels: Kernels, dtype: torch.dtype = torch.float32) -> Build:
    return Build(kernels=kernels, device=CPU, dtype=dtype)


def filled(model: Any, weights: Mapping[str, torch.Tensor]) -> Any:
    """Our model with a peer's weights; every one of them must have a place."""
    report = load_weights(model, weights.items())
    assert report.num_tensors == len(weights) - len(report.ignored)
    return model


def numbers(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
