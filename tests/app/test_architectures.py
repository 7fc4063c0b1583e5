"""Architectures with other parts than Llama's, from their files to greedy texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood import LLM
from tests.models.lm.peer import make_peer
from tests.tiny import VOCAB, write_tokenizer

NUM_NEW = 10
PROMPTS = [[5, 9, 77, 30, 8, 61, 200, 4], [90, 3], list(range(10, 50))]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "GPT2LMHeadModel": ("gpt2", {}),
    "BloomForCausalLM": ("bloom", {}),
    "Phi3ForCausalLM": ("phi3", {"pad_token_id": None}),
    "CohereForCausalLM": ("cohere", {"logit_scale": 1.0}),
    "Gemma3ForCausalLM": (
        "gemma3_text",
        {"head_dim": 8, "num_hidden_layers": 6, "sliding_window": 24, "layer_types": None},
    ),
}


@pytest.mark.parametrize("architecture", CASES)
def test_greedy_texts_equal_generate(architecture: str, tmp_path: Path) -> None:
    model_type, fields = CASES[architecture]
    peer = make_peer(
        model_type, architecture, vocab_size=VOCAB, eos_token_id=257, bos_token_id=None, **fields
    )
    peer.model.generation_config.eos_token_id = None
    peer.model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    if model_type == "gpt2":  # the first files of this model have shorter names
        weights = load_file(tmp_path / "model.safetensors")
        short = {name.removeprefix("transformer."): one for name, one in weights.items()}
        save_file(short, tmp_path / "model.safetensors", metadata={"format": "pt"})
    settings = {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True}
    with LLM(str(tmp_path), dtype="float32", num_threads=1) as llm:
        got = [one.token_ids for one in llm.generate(PROMPTS, settings)]
    with torch.inference_mode():
        for prompt, own in zip(PROMPTS, got, strict=True):
            whole = peer.model.generate(
                torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False
            )
            assert list(own) == whole[0, len(prompt) :].tolist()
