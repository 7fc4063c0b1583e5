"""ERNIE 4.5 without experts. Source: Baidu 2025, ERNIE 4.5 technical report."""

from __future__ import annotations

from typing import ClassVar

from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Mixer
from sapwood.models.hf_fields import switch
from sapwood.models.lm.architecture import Architecture


class Ernie4_5ForCausalLM(Architecture):  # noqa: N801 as config.json spells it
    """Llama with rotation of neighbouring pairs, and biases everywhere or nowhere."""

    absent: ClassVar = {
        "head_dim": 128,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    }
    has_windows = False

    def mixer(self, index: int) -> Mixer:
        bias = switch(self.config.hf, "use_bias")
        return self.attention(index, qkv_bias=bias, o_bias=bias, form=self._form())

    def _form(self) -> QkvForm:
        return QkvForm(pairs=self.config.rope.rotary_dim(self.config.head_dim))

    def feed_forward(self, index: int) -> FeedForward:
        return self.gated_mlp(bias=switch(self.config.hf, "use_bias"))


class PaddleOcrForCausalLM(Ernie4_5ForCausalLM):
    """PaddleOCR-VL's text part, which rotates halves."""

    def _form(self) -> QkvForm:
        return QkvForm()
