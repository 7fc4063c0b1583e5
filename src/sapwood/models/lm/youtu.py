"""Youtu-LLM. Source: Tencent 2025, its model code."""

from __future__ import annotations

from typing import ClassVar

from sapwood.models.lm.latent import InterleavedByField


class YoutuForCausalLM(InterleavedByField):
    """Latent attention, dense feed-forwards."""

    absent: ClassVar = {"tie_word_embeddings": True}
