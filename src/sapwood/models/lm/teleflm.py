"""Tele-FLM. Source: Li et al. 2024, arXiv:2404.16645."""

from __future__ import annotations

from typing import Any, ClassVar

from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.models.hf_fields import number, switch
from sapwood.models.lm.llama import LlamaForCausalLM


class TeleFLMForCausalLM(LlamaForCausalLM):
    """Llama, with factors of embeddings and of logits if config.json has use_mup."""

    absent: ClassVar = {"input_mult": 1.0, "output_mult": 1.0, "mup_scale_factor": 1.0}

    def embedding(self, *, scale: float = 1.0) -> VocabEmbedding:
        hf = self.config.hf
        factor = number(hf, "input_mult") if switch(hf, "use_mup") else 1.0
        return super().embedding(scale=scale * factor)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        hf, factor = self.config.hf, 1.0
        if switch(hf, "use_mup"):
            factor = number(hf, "output_mult") / number(hf, "mup_scale_factor")
        return super().head(tied, scale=factor, **details)
