"""What GGUF files of each family have that others lack: sizes, and how tensors are cut and named.

Source: llama.cpp's converters of the same families."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sapwood.base.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

Config = Mapping[str, Any]
Named = tuple[str, str, "Tensor"]
"""The name in the checkpoint's words without its last part, that part in GGUF's words (empty:
none), and the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model type of transformers.

    arch       its name in gguf.MODEL_ARCH
    add_sizes  writes the sizes that only this family has
    convert    a tensor of the checkpoint -> those of the file
    """

    arch: str
    add_sizes: Callable[[Any, Config], None]
    convert: Callable[[str, Tensor, Config], Iterator[Named]]


def family_of(config: Config) -> Family:
    """ConfigError for a family that is not known here."""
    found = _FAMILIES.get(config["model_type"])
    if found is None:
        raise ConfigError(
            f"no GGUF file can be written of {config['model_type']!r}, only of "
            f"{', '.join(_FAMILIES)}; leave out --gguf"
        )
    return found


def num_experts(config: Config) -> int:
    """The experts of a layer, under any of the names that transformers writes; 0: none."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    return next((config[name] for name in names if config.get(name)), 0)


def _attention_sizes(writer: Any, config: Config) -> None:
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])


def _plain(name: str, tensor: Tensor, config: Config) -> Iterator[Named]:
    base, _, kind = name.rpartition(".")
    yield base, kind, tensor


def _latent_sizes(writer: Any, config: Config) -> None:
    """llama.cpp takes the latent rows for the one head that all queries share."""
    import gguf

    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    writer.add_head_count_kv(1)
    writer.add_key_length(rank + rope)
    writer.add_value_length(rank)
    writer.add_key_length_mla(config["qk_nope_head_dim"] + rope)
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_kv_lora_rank(rank)
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_rope_dimension_count(rope)
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_gating_func(gguf.ExpertGatingFuncType.SIGMOID)
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])


def _deepseek(name: str, tensor: Tensor, config: Config) -> Iterator[Named]:
    base, _, kind = name.rpartition(".")
    if kind == "e_score_correction_bias":
        yield f"{base}.e_score_correction", "bias", tensor
        return
    before, _, layer = base.rpartition(".")
    if layer != "kv_b_proj":
        yield base, kind, tensor
        return
    heads = tensor.view(config["num_attention_heads"], -1, config["kv_lora_rank"])
    nope = config["qk_nope_head_dim"]
    keys, values = heads[:, :nope], heads[:, nope:]
    yield f"{before}.k_b_proj", kind, keys.transpose(1, 2)
    yield f"{before}.v_b_proj", kind, values


def _delta_sizes(writer: Any, config: Config) -> None:
    _attention_sizes(writer, config)
    values = config["linear_num_value_heads"]
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(values)
    writer.add_ssm_inner_size(values * config["linear_value_head_dim"])
    writer.add_full_attention_interval(config["layer_types"].index("full_attention") + 1)
    share = config["rope_parameters"]["partial_rotary_factor"]
    writer.add_rope_dimension_count(int(config["head_dim"] * share))
    writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])


def _qwen3_next(name: str, tensor: Tensor, config: Config) -> Iterator[Named]:
    base, _, kind = name.rpartition(".")
    before, _, layer = base.rpartition(".")
    if kind == "A_log":
        yield name, "", -tensor.float().exp()
    elif kind == "dt_bias":
        yield f"{base}.dt_proj", "bias", tensor
    elif layer == "conv1d":
        yield base, kind, tensor.float().squeeze(1)
    elif layer == "in_proj_qkvz":
        mixed, gate = _by_part(tensor, config)
        yield f"{before}.in_proj_qkv", kind, mixed
        yield f"{before}.in_proj_z", kind, gate
    elif layer.endswith("norm") and not base.endswith("linear_attn.norm"):
        yield base, kind, tensor.float() + 1
    else:
        yield base, kind, tensor


def _by_part(weight: Tensor, config: Config) -> tuple[Tensor, Tensor]:
    """Rows of a key head after the other -> all queries, keys and values; and all gates."""
    import torch

    num_keys, key_dim = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // num_keys * config["linear_value_head_dim"]
    heads = weight.view(num_keys, -1, weight.shape[1])
    *mixed, gate = torch.split(heads, [key_dim, key_dim, values, values], dim=1)
    return torch.cat([part.flatten(0, 1) for part in mixed]), gate.flatten(0, 1)


def _scan_sizes(writer: Any, config: Config) -> None:
    kinds = config["layer_types"]
    heads = config["num_key_value_heads"]
    writer.add_head_count_kv([heads if kind == "full_attention" else 0 for kind in kinds])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_rope_scaling_finetuned(config["position_embedding_type"] == "rope")
    writer.add_attention_scale(config["attention_multiplier"])
    writer.add_embedding_scale(config["embedding_multiplier"])
    writer.add_residual_scale(config["residual_multiplier"])
    writer.add_logit_scale(config["logits_scaling"])
    writer.add_ssm_conv_kernel(config["mamba_d_conv"])
    writer.add_ssm_state_size(config["mamba_d_state"])
    writer.add_ssm_group_count(config["mamba_n_groups"])
    writer.add_ssm_time_step_rank(config["mamba_n_heads"])
    writer.add_ssm_inner_size(config["mamba_n_heads"] * config["mamba_d_head"])


def _granite_hybrid(name: str, tensor: Tensor, config: Config) -> Iterator[Named]:
    base, _, kind = name.rpartition(".")
    before, _, layer = base.rpartition(".")
    if kind == "A_log":
        yield name, "", -tensor.float().exp()[:, None]
    elif kind == "D":
        yield name, "", tensor.float()[:, None]
    elif kind == "dt_bias":
        yield f"{base}.dt_proj", "bias", tensor
    elif layer == "conv1d" and kind == "weight":
        yield base, kind, tensor.float().squeeze(1)
    elif base.endswith("mamba.norm"):
        yield base, kind, tensor.float().view(config["mamba_n_groups"], -1)
    elif layer == "input_linear":
        gate, up = tensor.chunk(2)
        yield f"{before.replace('shared_mlp', 'mlp')}.gate_proj", kind, gate
        yield f"{before.replace('shared_mlp', 'mlp')}.up_proj", kind, up
    elif layer == "output_linear":
        yield f"{before.replace('shared_mlp', 'mlp')}.down_proj", kind, tensor
    elif layer in ("q_proj", "k_proj"):
        yield base, kind, _in_pairs(tensor, config)
    else:
        yield base, kind, tensor


def _in_pairs(weight: Tensor, config: Config) -> Tensor:
    """Rows of each head's two halves -> rows that are rotated together, next to each other."""
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    halves = weight.view(-1, 2, head_dim // 2, weight.shape[1])
    return halves.transpose(1, 2).reshape(weight.shape)


_FAMILIES = {
    "qwen3": Family(arch="QWEN3", add_sizes=_attention_sizes, convert=_plain),
    "qwen3_moe": Family(arch="QWEN3MOE", add_sizes=_attention_sizes, convert=_plain),
    "deepseek_v3": Family(arch="DEEPSEEK2", add_sizes=_latent_sizes, convert=_deepseek),
    "qwen3_next": Family(arch="QWEN3NEXT", add_sizes=_delta_sizes, convert=_qwen3_next),
    "granitemoehybrid": Family(
        arch="GRANITE_HYBRID", add_sizes=_scan_sizes, convert=_granite_hybrid
    ),
}
