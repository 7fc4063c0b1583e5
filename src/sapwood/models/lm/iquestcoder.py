"""IQuest-Coder. Source: IQuest Lab 2026, its model code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.llama import LlamaForCausalLM


class IQuestCoderForCausalLM(LlamaForCausalLM):
    """Llama with heads of 128 entries, and without its windows."""

    absent: ClassVar = {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 10_000.0}
    has_windows = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        if hf.get("clip_qkv") is not None or hf.get("use_sliding_window"):
            raise ConfigError(
                "config.json asks for clip_qkv or use_sliding_window, which are not implemented "
                "for IQuest-Coder"
            )
        return super().read(hf)
