"""StableLM 2 and 3B. Source: Bellagente et al. 2024, arXiv:2402.17834."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.layer import Layer, Mixer
from sapwood.layers.norm import HeadNormForm, Norm
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture


class StableLmForCausalLM(Architecture):
    """Llama with LayerNorms, and rotation of a quarter of each head. There may be a norm for each q
    and k head, and attention and feed-forward beside each other."""

    absent: ClassVar = {"partial_rotary_factor": 0.25, "rms_norm_eps": 1e-5}
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_eps"}
    has_windows = False
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def layer(self, index: int) -> Layer:
        if switch(self.config.hf, "use_parallel_residual"):
            return self.parallel_layer(index)
        return super().layer(index)

    def mixer(self, index: int) -> Mixer:
        hf = self.config.hf
        return self.attention(
            index,
            qkv_bias=switch(hf, "use_qkv_bias"),
            head_norm=HeadNormForm(separate="norms") if switch(hf, "qk_layernorm") else None,
            norm_names=("q_layernorm", "k_layernorm"),
        )
