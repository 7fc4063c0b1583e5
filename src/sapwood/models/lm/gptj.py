"""GPT-J. Source: Wang and Komatsuzaki 2021, its model code."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

from sapwood.base.errors import ConfigError
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.heads import QkvForm
from sapwood.layers.layer import FeedForward, Layer, Mixer
from sapwood.layers.norm import Norm
from sapwood.models.hf_fields import integer
from sapwood.models.lm.architecture import Architecture, Names


class GPTJForCausalLM(Architecture):
    """LayerNorms, no gates, attention and feed-forward beside each other; rotation of the first
    neighbouring pairs of each head."""

    absent: ClassVar = {"hidden_act": "gelu_new", "rms_norm_eps": 1e-5}
    spelled: ClassVar = {
        "hidden_size": "n_embd",
        "num_hidden_layers": "n_layer",
        "num_attention_heads": "n_head",
        "num_key_value_heads": (),
        "intermediate_size": "n_inner",
        "max_position_embeddings": "n_positions",
        "hidden_act": "activation_function",
        "rms_norm_eps": "layer_norm_epsilon",
    }
    names = Names(
        embedding="transformer.wte",
        layers="transformer.h",
        norm="transformer.ln_f",
        mixer="attn",
        before_mixer="ln_1",
    )
    ignorable = ("*.attn.bias", "*.attn.masked_bias", "*.attn.embed_positions")
    has_gates = False
    has_windows = False
    can_be_rescaled = False

    @classmethod
    def understood(cls, hf: Mapping[str, Any]) -> dict[str, Any]:
        found = super().understood(hf)
        hidden_size = integer(found, "hidden_size")
        found.setdefault("intermediate_size", 4 * hidden_size)
        head_dim = hidden_size // max(1, integer(found, "num_attention_heads"))
        rotary_dim = integer(found, "rotary_dim", default=head_dim)
        if not 2 <= rotary_dim <= head_dim:
            raise ConfigError(
                f"config.json has rotary_dim {rotary_dim}, but a head has {head_dim} entries"
            )
        # The next larger number, so that its product with head_dim is not rounded to below.
        found["partial_rotary_factor"] = math.nextafter(rotary_dim / head_dim, 2.0)
        return found

    def norm(self, size: int | None = None) -> Norm:
        return self.layer_norm(size)

    def layer(self, index: int) -> Layer:
        return self.parallel_layer(index)

    def mixer(self, index: int) -> Mixer:
        pairs = self.config.rope.rotary_dim(self.config.head_dim)
        return self.attention(index, form=QkvForm(pairs=pairs), o_name="out_proj")

    def feed_forward(self, index: int) -> FeedForward:
        return self.plain_mlp("fc_in", "fc_out", bias=True)

    def head(self, tied: VocabEmbedding | None, **details: Any) -> LMHead:
        return super().head(tied, bias=True, **details)
