"""The GGUF file of a checkpoint that `write_checkpoint` has written: the same weights."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sapwood.bench.random_model.gguf_families import family_of, num_experts

if TYPE_CHECKING:
    from torch import Tensor

NORMAL, CONTROL, UNUSED = 1, 3, 5
"""Types of tokens in GGUF."""


def write_gguf(checkpoint: Path, path: Path) -> None:
    """Write matrices in the checkpoint's dtype, and what is one-dimensional or routes in fp32.

    Prompts must be token ids: the file has the tokenizer's tokens and merges, but not the rule by
    which a text is split first."""
    import gguf

    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    family = family_of(config)
    experts = num_experts(config)
    arch = gguf.MODEL_ARCH[family.arch]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch])
    writer.add_name(f"random {config['model_type']}")
    _add_sizes(writer, config)
    family.add_sizes(writer, config)
    if experts:
        writer.add_expert_count(experts)
        writer.add_expert_used_count(config["num_experts_per_tok"])
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    _add_tokenizer(writer, checkpoint, config["vocab_size"])
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for whole, stored in _tensors(checkpoint, experts):
        for base, kind, tensor in family.convert(whole, stored, config):
            found = names.get_name(base)
            if found is None:
                raise ValueError(f"GGUF has no name for the tensor {whole}")
            name = f"{found}.{kind}" if kind else found
            _add_tensor(writer, name, tensor, wide=tensor.ndim == 1 or "gate_inp" in found)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_sizes(writer: Any, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])


def _add_tokenizer(writer: Any, checkpoint: Path, vocab_size: int) -> None:
    tokenizer = json.loads((checkpoint / "tokenizer.json").read_text(encoding="utf-8"))
    tokens = [f"[UNUSED {index}]" for index in range(vocab_size)]
    types = [UNUSED] * vocab_size
    for token, index in tokenizer["model"]["vocab"].items():
        tokens[index], types[index] = token, NORMAL
    for added in tokenizer["added_tokens"]:
        tokens[added["id"]], types[added["id"]] = added["content"], CONTROL
    merges = tokenizer["model"].get("merges", [])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([one if isinstance(one, str) else " ".join(one) for one in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)


def _tensors(checkpoint: Path, num_experts: int) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors, those of a layer's experts as one [experts, outputs, inputs]."""
    import torch
    from safetensors import safe_open

    places: dict[str, Path] = {}
    for file in sorted(checkpoint.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places |= dict.fromkeys(opened.keys(), file)

    def read(name: str) -> Tensor:
        with safe_open(places[name], "pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
            return tensor

    for name in places:
        before, is_expert, rest = name.partition(".experts.")
        number, _, kind = rest.partition(".")
        if not is_expert:
            yield name, read(name)
        elif number == "0":
            each = (f"{before}.experts.{index}.{kind}" for index in range(num_experts))
            yield f"{before}.experts.{kind}", torch.stack([read(one) for one in each])


def _add_tensor(writer: Any, name: str, tensor: Tensor, *, wide: bool) -> None:
    import gguf
    import torch

    if wide or tensor.dtype == torch.float32:
        writer.add_tensor(name, tensor.float().numpy())
    elif tensor.dtype == torch.float16:
        writer.add_tensor(name, tensor.numpy())
    else:
        # numpy has no bfloat16: the writer takes its bytes and the true type.
        data = tensor.contiguous().view(torch.uint8).numpy()
        writer.add_tensor(name, data, raw_dtype=gguf.GGMLQuantizationType.BF16)
