"""Pipelines by the class that model_index.json names. Loaded late."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from sapwood.base.errors import ConfigError
from sapwood.base.registry import Registry
from sapwood.pipelines.components import ComponentFolder, Precisions
from sapwood.pipelines.interface import Pipeline
from sapwood.pipelines.loras import PictureAdapters

PIPELINES: dict[str, str] = {
    "Flux2KleinPipeline": "sapwood.pipelines.flux2:Flux2KleinPipeline",
    "FluxFillPipeline": "sapwood.pipelines.flux:FluxFillPipeline",
    "FluxKontextPipeline": "sapwood.pipelines.flux:FluxKontextPipeline",
    "FluxPipeline": "sapwood.pipelines.flux:FluxPipeline",
    "QwenImageEditPipeline": "sapwood.pipelines.qwen_image_edit:QwenImageEditPipeline",
    "QwenImageEditPlusPipeline": "sapwood.pipelines.qwen_image_edit:QwenImageEditPlusPipeline",
    "QwenImagePipeline": "sapwood.pipelines.qwen_image:QwenImagePipeline",
    "StableDiffusion3Pipeline": "sapwood.pipelines.stable_diffusion_3:StableDiffusion3Pipeline",
    "StableDiffusionImg2ImgPipeline": "sapwood.pipelines.stable_diffusion:StableDiffusionPipeline",
    "StableDiffusionPipeline": "sapwood.pipelines.stable_diffusion:StableDiffusionPipeline",
    "StableDiffusionXLImg2ImgPipeline": (
        "sapwood.pipelines.stable_diffusion:StableDiffusionXLPipeline"
    ),
    "StableDiffusionXLPipeline": "sapwood.pipelines.stable_diffusion:StableDiffusionXLPipeline",
    "WanImageToVideoPipeline": "sapwood.pipelines.wan:WanImageToVideoPipeline",
    "WanPipeline": "sapwood.pipelines.wan:WanPipeline",
    "ZImagePipeline": "sapwood.pipelines.z_image:ZImagePipeline",
}


def load_pipeline(
    path: Path,
    precisions: Precisions,
    *,
    device: torch.device | None = None,
    kernels: str | None = None,
    adapters: PictureAdapters | None = None,
    dit_file: Path | None = None,
) -> Pipeline:
    """The pipeline of a folder with model_index.json, with its weights.

    kernels   as --kernels has them; None: the fastest
    adapters  is told of the layers that LoRA can add to; None: nobody will
    dit_file  the weights of what draws, instead of those in its folder
    Raises    ModelSourceError, WeightError or ConfigError; the last one names the known pipelines
              if nobody wrote this one
    """
    folder = ComponentFolder.open(
        path, device=device, kernels=kernels, adapters=adapters, dit_file=dit_file
    )
    if folder.pipeline_class not in PIPELINES:
        raise ConfigError(
            f"{path} is a {folder.pipeline_class or 'pipeline without a class'}, which is not "
            f"implemented; known: {', '.join(sorted(PIPELINES))}"
        )
    known = Registry[Callable[[ComponentFolder, Precisions], Pipeline]]("pipeline", PIPELINES)
    return known.get(folder.pipeline_class)(folder, precisions)
