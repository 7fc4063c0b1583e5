"""Granite's mixture with a shared expert. Source: IBM 2025, its model code."""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar

from sapwood.layers.layer import FeedForward
from sapwood.models.config import DecoderConfig, ExpertsConfig
from sapwood.models.hf_fields import integer
from sapwood.models.lm.granite_moe import GraniteMoeForCausalLM


class GraniteMoeSharedForCausalLM(GraniteMoeForCausalLM):
    """Granite's experts, and one beside them that every token has, unless its size is 0."""

    shared_name = "shared_mlp"
    shared_size: ClassVar[int] = 1024
    """Of the shared expert where config.json says none."""

    @classmethod
    def experts_in(cls, config: DecoderConfig) -> ExpertsConfig:
        shared = integer(config.hf, "shared_intermediate_size", default=cls.shared_size)
        return replace(super().experts_in(config), shared_size=shared)

    @classmethod
    def checkpoint_name(cls, name: str) -> str:
        """The shared expert counts as a part of the others' layer."""
        shared = cls.shared_name
        return name.replace(f".{shared}.", f".{cls.names.feed_forward}.{shared}.")

    def shared_expert(self, size: int) -> FeedForward:
        fused = None if self.is_from_gguf else "input_linear"
        return self.gated_mlp(
            size=size,
            names=("gate", "up", "output_linear"),
            fused=fused,
            build=self.build.beside_experts,
        )
