"""The models that are measured, by their shapes: weights are random."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sapwood.models.config import DecoderConfig
from sapwood.models.registry import read_decoder

QWEN3_0_6B: Mapping[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 151_936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40_960,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1_000_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
LLAMA_3_8B: Mapping[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}
SMALL = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
SMALL_HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's name, and its config.json."""

    name: str
    config: Mapping[str, Any]

    @property
    def decoder(self) -> DecoderConfig:
        return read_decoder(self.config)

    def bytes_per_step(self, *, context: int, dtype_bytes: int) -> int:
        """Bytes that a step of one request must read: all multiplied weights, and its KV."""
        decoder = self.decoder
        rows = decoder.vocab_size * decoder.hidden_size
        weights = decoder.num_parameters - (0 if decoder.tie_word_embeddings else rows)
        kv = 2 * decoder.num_layers * decoder.num_kv_heads * decoder.head_dim * context
        return (weights + kv) * dtype_bytes

    def flop_of_prefill(self, num_tokens: int) -> int:
        """Operations for a prompt: all matrices but the output layer, and causal attention.

        The output layer is left out because only the last token needs it.
        """
        decoder = self.decoder
        rows = decoder.vocab_size * decoder.hidden_size
        weights = decoder.num_parameters - rows * (1 if decoder.tie_word_embeddings else 2)
        scores = decoder.num_layers * decoder.num_heads * decoder.head_dim * num_tokens**2
        return 2 * weights * num_tokens + 2 * scores


def shapes(*, quick: bool) -> list[Shape]:
    """The measured shapes; `quick` gives tiny models of the same architectures."""
    known = {"Qwen3-0.6B": QWEN3_0_6B, "Llama-3-8B": LLAMA_3_8B}
    small = {**SMALL, **SMALL_HEADS} if quick else {}
    return [Shape(name, {**config, **small}) for name, config in known.items()]
