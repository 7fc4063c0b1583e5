"""What GGUF files of models with state space layers hold, in the words of Hugging Face's. No torch.

The rates of decay are the numbers themselves instead of their logs, a norm over groups is
[groups, size], and Falcon H1's multipliers are already in its weights (llama.cpp's converter).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_architecture import Architecture
from sapwood.store.gguf_fields import Metadata, granite

FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")
_NO_ATTENTION = {"num_attention_heads": 1, "num_key_value_heads": 1, "intermediate_size": 1}


def _heads(fields: Metadata) -> dict[str, int]:
    """The sizes of Mamba 2's layers by what they mean; ModelSourceError if they do not fit."""
    number, width = int(fields["ssm.time_step_rank"]), int(fields["ssm.inner_size"])
    if number < 1 or width % number:
        raise ModelSourceError(
            f"the file has {width} state space channels (ssm.inner_size) for {number} heads "
            "(ssm.time_step_rank), which is impossible; convert the model again"
        )
    return {
        "number": number,
        "head_dim": width // number,
        "groups": int(fields["ssm.group_count"]),
        "state_size": int(fields["ssm.state_size"]),
        "conv_length": int(fields["ssm.conv_kernel"]),
    }


def _biases(fields: Metadata, inward: str, conv: str) -> dict[str, bool]:
    return {inward: fields.has("ssm_in.bias"), conv: fields.has("ssm_conv1d.bias")}


def _as_bamba(fields: Metadata) -> dict[str, Any]:
    """The sizes of Mamba 2's layers in Bamba's spelling."""
    heads = _heads(fields)
    return {
        "mamba_n_heads": heads["number"],
        "mamba_d_head": heads["head_dim"],
        "mamba_n_groups": heads["groups"],
        "mamba_d_state": heads["state_size"],
        "mamba_d_conv": heads["conv_length"],
        **_biases(fields, "mamba_proj_bias", "mamba_conv_bias"),
    }


def per_layer(fields: Metadata, config: Mapping[str, Any], name: str) -> list[int]:
    """A number that may be given per layer, for each of them."""
    value, number = fields[name], config["num_hidden_layers"]
    values = value[:number] if isinstance(value, list) else [value] * number
    if len(values) != number:
        raise ModelSourceError(f"the file has {len(values)} numbers as {name} for {number} layers")
    return [int(one) for one in values]


def _mamba(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    normed = bool(fields.get("ssm.dt_b_c_rms", False))
    name = {"architectures": ["FalconMambaForCausalLM"], "model_type": "falcon_mamba"}
    return {
        **(name if normed else {}),
        **_NO_ATTENTION,
        "intermediate_size": int(fields["ssm.inner_size"]),
        "state_size": int(fields["ssm.state_size"]),
        "time_step_rank": int(fields["ssm.time_step_rank"]),
        "conv_kernel": int(fields["ssm.conv_kernel"]),
        **_biases(fields, "use_bias", "use_conv_bias"),
    }


def _mamba2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = _heads(fields)
    return {
        **_NO_ATTENTION,
        "num_heads": heads["number"],
        "head_dim": heads["head_dim"],
        "n_groups": heads["groups"],
        "state_size": heads["state_size"],
        "conv_kernel": heads["conv_length"],
        **_biases(fields, "use_bias", "use_conv_bias"),
    }


def _falcon_h1(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """llama.cpp's layer gates first, whatever the model's config.json said."""
    return {
        **_as_bamba(fields),
        "mamba_d_ssm": int(fields["ssm.inner_size"]),
        "mamba_rms_norm": fields.has("ssm_norm.weight"),
        "mamba_norm_before_gate": False,
        "projectors_bias": fields.has("ssm_out.bias"),
    }


def nemotron_h(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    heads = _heads(fields)
    kinds = zip(
        per_layer(fields, config, "attention.head_count_kv"),
        per_layer(fields, config, "feed_forward_length"),
        strict=True,
    )
    return {
        "layers_block_type": [
            "full_attention" if kv_heads else "mlp" if size else "linear_attention"
            for kv_heads, size in kinds
        ],
        "mamba_num_heads": heads["number"],
        "mamba_head_dim": heads["head_dim"],
        "n_groups": heads["groups"],
        "ssm_state_size": heads["state_size"],
        "conv_kernel": heads["conv_length"],
        **_biases(fields, "use_bias", "use_conv_bias"),
    }


def granite_hybrid(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Granite 4. Bamba's files have the same architecture, and rotate half of each head."""
    rotates = bool(fields.get("rope.scaling.finetuned", True))
    if rotates and "partial_rotary_factor" in config:
        raise ModelSourceError(
            "the file rotates a part of each head (Bamba), which sapwood does not read from GGUF; "
            "a safetensors version of the model may be served"
        )
    heads = per_layer(fields, config, "attention.head_count_kv")
    return {
        **granite(fields, config),
        **_as_bamba(fields),
        "layer_types": ["full_attention" if one else "linear_attention" for one in heads],
        "position_embedding_type": "rope" if rotates else "nope",
        "num_local_experts": 0,
        "shared_intermediate_size": config["intermediate_size"],
    }


def _granite_dense(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    size = fields.shape("blk.0.ffn_gate.weight")[0]
    return {**granite_hybrid(fields, config), "shared_intermediate_size": size}


def state_names(mixer: str) -> dict[str, str]:
    """Of Mamba 2's layers; mixer: name of a layer's mixer."""
    return {
        "ssm_in": f"{mixer}.in_proj",
        "ssm_conv1d": f"{mixer}.conv1d",
        "ssm_dt.bias": f"{mixer}.dt_bias",
        "ssm_a": f"{mixer}.A_log",
        "ssm_d": f"{mixer}.D",
        "ssm_norm": f"{mixer}.norm",
        "ssm_out": f"{mixer}.out_proj",
    }


def selective_names(mixer: str) -> dict[str, str]:
    """Of Mamba's layers."""
    others = ("ssm_dt.bias", "ssm_norm")
    return {
        **{name: own for name, own in state_names(mixer).items() if name not in others},
        "ssm_x": f"{mixer}.x_proj",
        "ssm_dt": f"{mixer}.dt_proj",
        "ssm_dt_norm": f"{mixer}.dt_layernorm",
        "ssm_b_norm": f"{mixer}.b_layernorm",
        "ssm_c_norm": f"{mixer}.c_layernorm",
    }


def feed_forward_names(module: str) -> dict[str, str]:
    return {f"ffn_{part}": f"{module}.{part}_proj" for part in ("gate", "up", "down")}


_BACKBONE = {
    "token_embd": "backbone.embeddings",
    "output_norm": "backbone.norm_f",
    "attn_norm": "norm",
}
NEMOTRON_NAMES = {
    **state_names("mixer"),
    **feed_forward_names("mixer"),
    "token_embd": "model.embeddings",
    "output_norm": "model.norm_f",
    "attn_norm": "norm",
    "attn_q": "mixer.q_proj",
    "attn_k": "mixer.k_proj",
    "attn_v": "mixer.v_proj",
    "attn_output": "mixer.o_proj",
}
GRANITE_NAMES = {
    **state_names("mamba"),
    "ffn_gate": "shared_mlp.gate",
    "ffn_up": "shared_mlp.up",
    "ffn_down": "shared_mlp.output_linear",
}

STATES: Mapping[str, Architecture] = {
    "falcon-h1": Architecture(
        class_name="FalconH1ForCausalLM",
        model_type="falcon_h1",
        names={
            **state_names("mamba"),
            **feed_forward_names("feed_forward"),
            "ffn_norm": "pre_ff_layernorm.weight",  # files have it without a kind
            "output_norm": "model.final_layernorm",
        },
        more=_falcon_h1,
    ),
    "granitehybrid": Architecture(
        class_name="GraniteMoeHybridForCausalLM",
        model_type="granitemoehybrid",
        permuted=True,
        mixes=True,
        names=GRANITE_NAMES,
        reads=FACTORS,
        more=_granite_dense,
    ),
    "mamba": Architecture(
        class_name="MambaForCausalLM",
        model_type="mamba",
        known_as=("FalconMambaForCausalLM",),
        layers="backbone.layers",
        names={**selective_names("mixer"), **_BACKBONE},
        more=_mamba,
    ),
    "mamba2": Architecture(
        class_name="Mamba2ForCausalLM",
        model_type="mamba2",
        layers="backbone.layers",
        names={**state_names("mixer"), **_BACKBONE},
        more=_mamba2,
    ),
    "nemotron_h": Architecture(
        class_name="NemotronHForCausalLM",
        model_type="nemotron_h",
        norm="rms or layer",
        activation="relu2",
        mixes=True,
        names=NEMOTRON_NAMES,
        more=nemotron_h,
    ),
}
"""Those whose files have no experts."""
