"""SmolLM2-135M as transformers computes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from sapwood.models.loader.weights import iterate_weights
from sapwood.store import ModelFiles

CONFIG = LlamaConfig(
    vocab_size=49_152,
    hidden_size=576,
    intermediate_size=1536,
    num_hidden_layers=30,
    num_attention_heads=9,
    num_key_value_heads=3,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
    tie_word_embeddings=True,
)
"""Not from the file, so that a mistake in reading it shows."""


def transformers_model(files: ModelFiles) -> Callable[[Sequence[int]], Tensor]:
    """Token ids -> [n, vocab], the logits in fp32."""
    weights = dict(iterate_weights(files, dtype=torch.float32))
    model = LlamaForCausalLM.from_pretrained(None, config=CONFIG, state_dict=weights).eval()

    @torch.inference_mode()
    def logits(token_ids: Sequence[int]) -> Tensor:
        found: Tensor = model(torch.tensor([list(token_ids)])).logits[0]
        return found

    return logits
