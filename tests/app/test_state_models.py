"""Models of state space layers in an engine: hits on kept states, chunks, requests side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from sapwood import LLM
from tests.app.test_logprobs import ask
from tests.app.test_schedule_independence import kernels_here
from tests.app.test_windows import NUM_OUTPUTS, Reference, check, text
from tests.models.lm.bailing_linear import peer
from tests.tiny import CONTEXT, VOCAB, write_tokenizer

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
    "bos_token_id": None,
    "pad_token_id": None,
}
MODELS: dict[str, dict[str, Any]] = {
    # Attention and states in the same layers.
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_state": 16},
    # States only.
    "mamba2": {"num_heads": 8, "head_dim": 16, "n_groups": 2, "state_size": 16},
    "mamba": {"state_size": 8},
    "minimax": {
        "num_local_experts": 4,
        "layer_types": ["linear_attention", "full_attention"],
    },
    # One block for the keys and values of two layers, which have states, too.
    "zamba2": {
        "layers_block_type": ["hybrid", "hybrid"],
        "mamba_d_state": 16,
        "adapter_rank": 8,
        "tie_word_embeddings": True,
    },
}


def saved(directory: Path, model_type: str) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **COMMON | MODELS[model_type])
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        parameter.data = 1.0 + 0.2 * noise if is_norm else noise * parameter.shape[-1] ** -0.5
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


@pytest.mark.parametrize("model_type", MODELS)
def test_beside_others_and_from_kept_states(tmp_path: Path, model_type: str) -> None:
    from transformers import AutoModelForCausalLM

    path = saved(tmp_path / "model", model_type)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()

    @torch.inference_mode()
    def reference(token_ids: list[int]) -> torch.Tensor:
        logits = model(torch.tensor([token_ids]), use_cache=False).logits
        return logits[0].double().log_softmax(-1)

    check_an_engine(path, reference)


def test_lightning_and_latent_attention(tmp_path: Path) -> None:
    """Ling 2.5, which transformers does not have: rows of latent attention and states."""
    own = {"vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "eos_token_id": 257}
    formulas = peer("ling", **own)
    save_file(formulas.weights, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(formulas.hf_config))
    write_tokenizer(tmp_path)

    @torch.inference_mode()
    def reference(token_ids: list[int]) -> torch.Tensor:
        return formulas.logits(token_ids).double().log_softmax(-1)

    check_an_engine(tmp_path, reference)


def check_an_engine(path: Path, reference: Reference) -> None:
    """Twice several prompts at once, some of which have a long beginning in common."""
    stem = text(61, seed=1)
    prompts = [text(70, seed=2), stem + text(9, seed=3), text(3, seed=4), stem + text(30, seed=5)]
    with LLM(
        str(path),
        dtype="float32",
        num_threads=1,
        page_size=4,
        max_total_tokens=1024,
        max_running_requests=4,
        chunked_prefill_size=7,
        mamba_track_interval=12,
        max_mamba_cache_size=40,
        skip_server_warmup=True,
        kernels=kernels_here()[0],
    ) as llm:
        for _ in range(2):
            results = ask(llm, prompts, None, max_new_tokens=NUM_OUTPUTS)
            for prompt, result in zip(prompts, results, strict=True):
                check(result, prompt, reference)
        stats = llm.stats()
    assert stats.num_leased_pages == 0
    assert stats.num_cached_tokens > 2 * 60 + 60, "later prompts went on from kept states"
