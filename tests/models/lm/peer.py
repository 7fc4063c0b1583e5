"""Small random models of transformers, and its logits to compare with."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}

FUSED_IN_MEMORY = frozenset(
    {
        "afmoe",
        "bailing_hybrid",
        "cohere2_moe",
        "deepseek_v2",
        "deepseek_v3",
        "deepseek_v32",
        "dots1",
        "ernie4_5_moe",
        "exaone_moe",
        "flex_olmo",
        "glm4_moe",
        "glm4_moe_lite",
        "glm_moe_dsa",
        "granitemoe",
        "granitemoehybrid",
        "granitemoeshared",
        "hunyuan_v1_moe",
        "hy_v3",
        "jamba",
        "kimi_linear",
        "lfm2_moe",
        "longcat_flash",
        "mellum",
        "mimo_v2_flash",
        "minimax",
        "minimax_m2",
        "mixtral",
        "olmoe",
        "phimoe",
        "qwen2_moe",
        "qwen3_5_moe_text",
        "qwen3_5_text",
        "qwen3_moe",
        "qwen3_next",
        "solar_open",
    }
)
"""Model types whose experts lie in one tensor in memory, and in many in files."""


@dataclass(frozen=True)
class Peer:
    """hf_config is what config.json would hold; weights are named as in a checkpoint."""

    hf_config: dict[str, Any]
    weights: dict[str, Tensor]
    model: Any

    @torch.no_grad()
    def logits(self, token_ids: list[int]) -> Tensor:
        """[len(token_ids), vocab], fp32, of the whole text at once."""
        return self.model(torch.tensor([token_ids]), use_cache=False).logits[0]


def make_peer(
    model_type: str, architecture: str, *, zeros: str | None = None, **fields: Any
) -> Peer:
    """Weights are drawn large enough that logits spread over several units: a wrong sign or a
    wrong position then shows far above the tolerance. zeros: in the names of weights that are 0."""
    # Not above: the ranks of test_tensor_parallel.py import this module, and need no transformers.
    from transformers import AutoConfig, AutoModelForCausalLM

    generator = torch.Generator().manual_seed(0)
    config = AutoConfig.for_model(model_type, **(SIZES | fields))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if zeros is not None and zeros in name:
            parameter.data = torch.zeros_like(noise)
        elif "norm" in name.replace("norm_attn_norm", ""):  # DBRX's attention with its norms
            parameter.data = 1.0 + 0.2 * noise
        else:
            parameter.data = noise * (0.3 if parameter.dim() == 1 else parameter.shape[1] ** -0.5)
    for name, buffer in model.named_buffers():
        if "layer_scalar" in name:  # one in a new model
            buffer.data = 0.5 + torch.rand(buffer.shape, generator=generator)
        if "correction_bias" in name or "expert_bias" in name:  # zero in a new model
            buffer.data = 0.4 * torch.randn(buffer.shape, generator=generator)
    if model_type == "zamba2":
        soften_zamba2(model)
    model.tie_weights()
    hf_config = config.to_dict() | {"architectures": [architecture]}
    return Peer(hf_config, saved_weights(model), model)


def soften_zamba2(model: Any) -> None:
    """Its blocks enlarge what they take, rounding errors too; so does Mamba, unless there is much
    that it is added to. The embedding is the output layer too."""
    root = model.config.hidden_size**0.5
    model.model.embed_tokens.weight.data *= root
    model.model.final_layernorm.weight.data /= root
    for layer in model.model.layers:
        if hasattr(layer, "linear"):
            layer.linear.weight.data *= 0.2


def saved_weights(model: Any) -> dict[str, Tensor]:
    """As transformers writes them to a file, where the names of some differ from state_dict's."""
    from safetensors.torch import load_file

    if model.config.model_type == "olmo_hybrid":
        return olmo_hybrid_weights(model)
    if model.config.model_type not in FUSED_IN_MEMORY:
        return dict(model.state_dict())
    with TemporaryDirectory() as directory:
        model.save_pretrained(directory)
        found = load_file(Path(directory) / "model.safetensors")
    if model.config.model_type == "kimi_linear":  # published files have the name in sparse layers
        for layer, kind in enumerate(model.config.mlp_layer_types):
            sparse, dense = (f"layers.{layer}.{name}." for name in ("block_sparse_moe", "mlp"))
            if kind == "dense":
                found = {name.replace(sparse, dense): one for name, one in found.items()}
    return found


def olmo_hybrid_weights(model: Any) -> dict[str, Tensor]:
    """As published files have them; save_pretrained renames too much, and splits convolutions into
    equal parts."""
    config, found = model.config, {}
    keys = config.linear_num_key_heads * config.linear_key_head_dim
    sizes = (keys, keys, config.linear_num_value_heads * config.linear_value_head_dim)
    norms = {"input_layernorm": "attention_layer_norm"}
    norms["post_attention_layernorm"] = "feedforward_layer_norm"
    for name, tensor in model.state_dict().items():
        _, _, index, *rest = [*name.split("."), *[""] * 3]
        if index.isdigit() and config.layer_types[int(index)] == "linear_attention":
            if rest[1] == "conv1d":
                for part, rows in zip("qkv", tensor.split(sizes), strict=True):
                    found[name.replace("conv1d", f"{part}_conv1d")] = rows
                continue
            name = name.replace(rest[0], norms.get(rest[0], rest[0]))
        found[name] = tensor
    return found


def random_text(length: int, *, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, SIZES["vocab_size"], (length,), generator=generator).tolist()
