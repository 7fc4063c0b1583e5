"""What all GGUF files of mixtures of experts say alike, in the words of Hugging Face's. No torch.

A tensor of all experts [experts, out, in] has a name with "{}" for the number of one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_fields import Metadata

SOFTMAX, SIGMOID = 1, 2
"""Values of expert_gating_func: what the router's products become."""
NO_FUNCTION = 0


def choice(fields: Metadata, *, function: int, normalises: bool) -> dict[str, Any]:
    """Fields about the choice of experts, which llama.cpp knows for an architecture unless the file
    says them. Raises ModelSourceError for another function than the model's."""
    said = fields.get("expert_gating_func", NO_FUNCTION)
    if said not in (NO_FUNCTION, function):
        raise ModelSourceError(
            f"the file has expert_gating_func {said}, which sapwood does not serve for this "
            f"architecture (known: {function}); a safetensors version of the model may be served"
        )
    return {
        "num_experts_per_tok": int(fields["expert_used_count"]),
        "norm_topk_prob": bool(fields.get("expert_weights_norm", normalises)),
    }


def grouped(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """DeepSeek V3's experts, as other families have them."""
    return {
        **choice(fields, function=SIGMOID, normalises=True),
        "n_routed_experts": int(fields["expert_count"]),
        "n_shared_experts": int(fields.get("expert_shared_count", 0)),
        "moe_intermediate_size": int(fields["expert_feed_forward_length"]),
        "first_k_dense_replace": int(fields.get("leading_dense_block_count", 0)),
        "routed_scaling_factor": float(fields.get("expert_weights_scale", 1.0)),
        "n_group": int(fields.get("expert_group_count", 1)),
        "topk_group": int(fields.get("expert_group_used_count", 1)),
        "use_qk_norm": fields.has("attn_q_norm.weight"),
    }


def expert_names(module: str, layers: tuple[str, str, str]) -> dict[str, str]:
    parts = zip(("gate", "up", "down"), layers, strict=True)
    return {f"ffn_{part}_exps": f"{module}.experts.{{}}.{layer}" for part, layer in parts}


def shared_names(module: str) -> dict[str, str]:
    return {f"ffn_{part}_shexp": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


EXPERT_LAYERS = ("gate_proj", "up_proj", "down_proj")
OF_MLP = {"ffn_gate_inp": "mlp.gate", **expert_names("mlp", EXPERT_LAYERS)}
OF_MIXTRAL = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    **expert_names("block_sparse_moe", ("w1", "w3", "w2")),
}
GROUPED_NAMES = {
    **OF_MLP,
    **shared_names("mlp.shared_experts"),
    "exp_probs_b.bias": "mlp.gate.e_score_correction_bias",
}
READS = ("expert_count",)
