"""StableLM 2 and 3B. Source: Bellagente et al. 2024, arXiv:2402.17834."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.layer import Mixer
from sapwood.layers.norm import Norm
from sapwood.models.config import DecoderConfig
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture


class StableLmForCausalLM(Architecture):
    """Llama with LayerNorms, and rotation of a quarter of each head."""

    absent: ClassVar = {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5}
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_eps"}
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def read(cls, hf: Mapping[str, Any]) -> DecoderConfig:
        for name in ("qk_layernorm", "use_parallel_residual"):
            if switch(hf, name):
                raise ConfigError(f"config.json asks for {name}, which is not implemented")
        return super().read(hf)

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def mixer(self, index: int) -> Mixer:
        return self.attention(index, qkv_bias=switch(self.config.hf, "use_qkv_bias"))
