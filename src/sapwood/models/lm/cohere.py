"""Command R. Source: Cohere 2024, its model code."""

from __future__ import annotations

from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import Layer, Mixer
from sapwood.layers.norm import HeadNormForm, Norm
from sapwood.models.hf_fields import number, switch
from sapwood.models.lm.architecture import Architecture


class CohereForCausalLM(Architecture):
    """LayerNorms without bias, attention and feed-forward beside each other, rotation of
    neighbouring pairs, and a factor of the logits."""

    absent: ClassVar = {
        "logit_scale": 0.0625,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
    spelled: ClassVar = {"rms_norm_eps": "layer_norm_eps"}
    has_windows = False
    can_be_rescaled = False

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size, bias=False)

    def layer(self, index: int) -> Layer:
        return self.parallel_layer(index)

    def mixer(self, index: int) -> Mixer:
        bias = self.config.attention_bias
        rope = self.rope_of(index)
        return self.attention(
            index,
            qkv_bias=bias,
            o_bias=bias,
            form=QkvForm(pairs=rope.rotary_dim(self.config.head_dim) if rope else 0),
            head_norm=HeadNormForm() if switch(self.config.hf, "use_qk_norm") else None,
        )

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, scale=number(self.config.hf, "logit_scale"), **details)
