"""Seeing pictures and videos: how much is encoded before a step, and how much stays."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionConfig:
    language_only: bool = option(
        False,
        "Serve the text part of a model that also sees: the rest is not loaded, and requests with "
        "pictures are refused.",
    )
    max_encoder_patches_per_step: int = option(
        4096,
        "Patches of pictures and videos that are encoded before a step at most, so that requests "
        "that decode need not wait long; a medium with more patches is encoded alone.",
        unit="patches",
    )
    vlm_cache_size_mb: int = option(
        100,
        "Memory for the vectors of encoded pictures and videos, which requests that show the same "
        "ones share. A medium whose vectors take more is refused.",
        unit="MB",
        peer_env="SGLANG_VLM_CACHE_SIZE_MB",
    )
