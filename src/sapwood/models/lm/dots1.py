"""dots.llm1. Source: Huo et al. 2025, arXiv:2506.05767."""

from __future__ import annotations

from typing import ClassVar

from sapwood.models.lm.grouped_mixture import GroupedMixture
from sapwood.models.lm.qwen3 import Qwen3ForCausalLM


class Dots1ForCausalLM(GroupedMixture, Qwen3ForCausalLM):
    """Qwen3's attention, DeepSeek's experts."""

    absent: ClassVar = {**GroupedMixture.absent, "max_window_layers": 0}
