"""MiMo-7B. Source: Xiaomi 2025, arXiv:2505.07608."""

from __future__ import annotations

from sapwood.models.lm.qwen2 import Qwen2ForCausalLM


class MiMoForCausalLM(Qwen2ForCausalLM):
    """Qwen 2; the layers that predict further tokens are left out."""

    ignorable = (*Qwen2ForCausalLM.ignorable, "model.mtp_layers.*")
