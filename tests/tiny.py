"""Tiny models made on the spot, for tests that need a real one but not what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import tokenizers

EOS, START = "<|im_end|>", "<|im_start|>"
VOCAB = 260
"""Ids of the model; its tokenizer has two fewer."""
CONTEXT = 256
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}"
    "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def llama_config(**fields: Any) -> dict[str, Any]:
    """config.json of a Llama of two layers; head_dim 32 is what the C++ kernels need."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "eos_token_id": 257,
        **fields,
    }


def write_tokenizer(directory: Path) -> None:
    """One token per byte of UTF-8, then two special ones; a chat template."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens([START, EOS])
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": EOS, "chat_template": CHAT_TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


def write_llama(directory: Path, **fields: Any) -> Path:
    """A model directory for --load-format dummy; returns it."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(llama_config(**fields)))
    write_tokenizer(directory)
    return directory


def save_qwen3(directory: Path, **fields: Any) -> Path:
    """A random Qwen3 as transformers saves it: config.json, safetensors, and a tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return _save_dense(directory, Qwen3Config, Qwen3ForCausalLM, fields)


def save_llama(directory: Path, **fields: Any) -> Path:
    """A random Llama, as `save_qwen3`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    return _save_dense(directory, LlamaConfig, LlamaForCausalLM, fields)


def _save_dense(
    directory: Path, config_class: Any, model_class: Any, fields: dict[str, Any]
) -> Path:
    """Weights are drawn so that logits spread over several units, and no two candidates are close
    to each other."""
    import torch

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 96,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model = model_class(config_class(**sizes | fields)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data = 1.0 + 0.2 * noise
        else:
            parameter.data = noise * parameter.shape[1] ** -0.5
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def save_qwen3_moe(directory: Path, **fields: Any) -> Path:
    """A random Qwen3 with experts as transformers saves it; no two experts are chosen by a hair."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 48,
        "num_experts": 6,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "eos_token_id": 257,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes | fields)).eval()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = (
            1.0 + 0.2 * noise if "norm" in name else noise * parameter.shape[-1] ** -0.5
        )
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def save_lfm2(directory: Path, **fields: Any) -> Path:
    """A random LFM2 as transformers saves it: three layers that keep states, one of attention."""
    import torch
    from transformers import Lfm2Config, Lfm2ForCausalLM

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "block_multiple_of": 16,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "conv"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model = Lfm2ForCausalLM(Lfm2Config(**sizes | fields)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        is_norm = "norm" in name
        parameter.data = 1.0 + 0.2 * noise if is_norm else noise * parameter.shape[-1] ** -0.5
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def save_qwen3_5(directory: Path, **fields: Any) -> Path:
    """A random Qwen3.5 as transformers saves it: two gated delta nets around attention."""
    import torch
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "linear_num_key_heads": 1,
        "linear_num_value_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": False,
        "eos_token_id": 257,
        "bos_token_id": None,
        "pad_token_id": None,
    }
    model = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**sizes | fields)).eval()
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        small = 0.3 if parameter.dim() == 1 else parameter.shape[-1] ** -0.5
        parameter.data = noise * (0.2 if "norm" in name else small)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return directory


POOLED_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": CONTEXT,
}


def save_pooled(directory: Path, architecture: str, **fields: Any) -> Any:
    """A random model that answers with numbers, as transformers saves it, with a tokenizer.

    Returns transformers' model, in fp32. Weights are drawn large enough that numbers differ.
    """
    import torch
    import transformers

    build = getattr(transformers, architecture)
    sizes = POOLED_SIZES | {"bos_token_id": None, "eos_token_id": None} | fields
    model = build(build.config_class(**sizes)).eval().float()
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "norm" in name.lower() and "weight" in name:
            parameter.data = 1.0 + 0.2 * noise
        else:
            parameter.data = noise * (0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return model
