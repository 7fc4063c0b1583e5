"""What GGUF files of each architecture hold, in the words of Hugging Face's. No torch.

Names and keys: gguf-py's constants. llama.cpp has one way to rotate per architecture: where it
rotates neighbouring pairs and Hugging Face's model halves, rows of queries and keys were put in
another order when the file was made. Its norms multiply by their weight, so 1 was added to weights
that are differences from 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sapwood.base.errors import ModelSourceError


class Metadata(Protocol):
    """A file's metadata: `fields["block_count"]` is the value of <architecture>.block_count."""

    def get(self, name: str, default: Any = None) -> Any: ...

    def __getitem__(self, name: str) -> Any:
        """Raises ModelSourceError if there is no such value."""
        ...

    def has(self, tensor: str) -> bool:
        """Whether the first layer has that tensor: "attn_q.bias", …"""
        ...


MoreFields = Callable[[Metadata, Mapping[str, Any]], Mapping[str, Any]]
"""From metadata, and the fields of config.json that all architectures have, to further fields."""


def _none(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The Hugging Face counterpart of a GGUF architecture.

    permuted     whether rows of the query and key projections are in llama.cpp's order of rotary
                 pairs
    adds_one     whether weights of norms are larger by 1 than in Hugging Face's files
    norm         "rms" or "layer": whose epsilon the file has
    epsilon      what config.json calls it
    activation   hidden_act
    has_windows  whether a sliding window is served; others refuse a file that has one
    names        parts of tensor names that differ from Llama's, GGUF's -> Hugging Face's
    reads        metadata that `more` reads, and that is refused for others
    more         further fields of config.json
    """

    class_name: str
    model_type: str
    permuted: bool = False
    adds_one: bool = False
    norm: str = "rms"
    epsilon: str = "rms_norm_eps"
    activation: str = "silu"
    has_windows: bool = False
    names: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    more: MoreFields = _none


def _gemma2(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "attn_logit_softcapping": fields.get("attn_logit_softcapping"),
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, num_layers_of_27b=46),
        "sliding_window": int(fields["attention.sliding_window"]),
    }


def _gemma3(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "final_logit_softcapping": fields.get("final_logit_softcapping"),
        "query_pre_attn_scalar": _query_scalar(config, num_layers_of_27b=62),
        "sliding_window": int(fields["attention.sliding_window"]),
        "rope_local_base_freq": fields.get("rope.freq_base_swa", 10_000.0),
    }


def _query_scalar(config: Mapping[str, Any], *, num_layers_of_27b: int) -> int:
    """Files do not say it: it is head_dim, but for the model of 27 billion parameters."""
    if config["num_hidden_layers"] == num_layers_of_27b:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return int(config["head_dim"])


def granite(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "attention_multiplier": fields.get("attention.scale", config["head_dim"] ** -0.5),
        "embedding_multiplier": fields.get("embedding_scale", 1.0),
        "residual_multiplier": fields.get("residual_scale", 1.0),
        "logits_scaling": fields.get("logit_scale", 1.0),
    }


def _minicpm(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    depth = math.sqrt(config["num_hidden_layers"])
    return {
        "scale_emb": fields.get("embedding_scale", 12.0),
        "scale_depth": fields.get("residual_scale", 1.4 / depth) * depth,
        "dim_model_base": round(
            config["hidden_size"] / fields.get("logit_scale", config["hidden_size"] / 256)
        ),
    }


def _cohere(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {
        "logit_scale": fields["logit_scale"],
        "use_qk_norm": fields.has("attn_q_norm.weight"),
        "sliding_window": fields.get("attention.sliding_window"),
    }


def _stablelm(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    if fields.has("attn_q_norm.weight"):
        raise ModelSourceError(
            "the file has norms of each head in one tensor, which sapwood does not read from GGUF "
            "for stablelm; a safetensors version of the model may be served"
        )
    return {
        "use_parallel_residual": bool(fields.get("use_parallel_residual", False)),
        "use_qkv_bias": fields.has("attn_q.bias"),
    }


def _exaone4(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    pattern = fields.get("attention.sliding_window_pattern")
    if not isinstance(pattern, list) or not fields.get("attention.sliding_window"):
        return {}
    kinds = ["sliding_attention" if is_sliding else "full_attention" for is_sliding in pattern]
    return {"layer_types": kinds}


def _use_bias(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"use_bias": fields.has("attn_q.bias")}


def _seed_oss(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"attention_out_bias": fields.has("attn_output.bias")}


def _olmo(fields: Metadata, config: Mapping[str, Any]) -> Mapping[str, Any]:
    return {"clip_qkv": fields.get("attention.clamp_kqv") or None}


_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS = {**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_PHI2_NAMES = {
    "attn_output": "self_attn.dense",
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
    "output_norm": "model.final_layernorm",
}
_GLM4_NAMES = {
    "ffn_up": "mlp.gate_up_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
}

_TANH = "gelu_pytorch_tanh"
FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(class_name="LlamaForCausalLM", model_type="llama", permuted=True),
    "mistral3": Architecture(
        class_name="MistralForCausalLM", model_type="mistral", permuted=True, has_windows=True
    ),
    "qwen2": Architecture(class_name="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": Architecture(class_name="Qwen3ForCausalLM", model_type="qwen3"),
    "arcee": Architecture(
        class_name="ArceeForCausalLM", model_type="arcee", permuted=True, activation="relu2"
    ),
    "cohere2": Architecture(
        class_name="Cohere2ForCausalLM",
        model_type="cohere2",
        norm="layer",
        epsilon="layer_norm_eps",
        has_windows=True,
        reads=("logit_scale",),
        more=_cohere,
    ),
    "command-r": Architecture(
        class_name="CohereForCausalLM",
        model_type="cohere",
        norm="layer",
        epsilon="layer_norm_eps",
        reads=("logit_scale",),
        more=_cohere,
    ),
    "ernie4_5": Architecture(
        class_name="Ernie4_5ForCausalLM", model_type="ernie4_5", more=_use_bias
    ),
    "exaone4": Architecture(
        class_name="Exaone4ForCausalLM",
        model_type="exaone4",
        has_windows=True,
        names=_NORMS_AFTER,
        more=_exaone4,
    ),
    "gemma": Architecture(
        class_name="GemmaForCausalLM", model_type="gemma", adds_one=True, activation=_TANH
    ),
    "gemma2": Architecture(
        class_name="Gemma2ForCausalLM",
        model_type="gemma2",
        adds_one=True,
        activation=_TANH,
        has_windows=True,
        names=_GEMMA_NORMS,
        more=_gemma2,
    ),
    "gemma3": Architecture(
        class_name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        adds_one=True,
        activation=_TANH,
        has_windows=True,
        names=_GEMMA_NORMS,
        more=_gemma3,
    ),
    "glm4": Architecture(class_name="Glm4ForCausalLM", model_type="glm4", names=_GLM4_NAMES),
    "granite": Architecture(
        class_name="GraniteForCausalLM",
        model_type="granite",
        permuted=True,
        reads=FACTORS,
        more=granite,
    ),
    "hunyuan-dense": Architecture(
        class_name="HunYuanDenseV1ForCausalLM",
        model_type="hunyuan_v1_dense",
        names={
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
    ),
    "minicpm": Architecture(
        class_name="MiniCPMForCausalLM",
        model_type="minicpm",
        permuted=True,
        reads=FACTORS[1:],
        more=_minicpm,
    ),
    "nemotron": Architecture(
        class_name="NemotronForCausalLM",
        model_type="nemotron",
        adds_one=True,
        norm="layer",
        epsilon="norm_eps",
        activation="relu2",
    ),
    "olmo": Architecture(
        class_name="OlmoForCausalLM",
        model_type="olmo",
        permuted=True,
        norm="layer",
        reads=("attention.clamp_kqv",),
        more=_olmo,
    ),
    "olmo2": Architecture(class_name="Olmo2ForCausalLM", model_type="olmo2", names=_NORMS_AFTER),
    "phi2": Architecture(
        class_name="PhiForCausalLM",
        model_type="phi",
        norm="layer",
        epsilon="layer_norm_eps",
        activation="gelu_new",
        names=_PHI2_NAMES,
    ),
    "phi3": Architecture(
        class_name="Phi3ForCausalLM",
        model_type="phi3",
        has_windows=True,
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "seed_oss": Architecture(
        class_name="SeedOssForCausalLM",
        model_type="seed_oss",
        names={"post_attention_norm": "post_attention_layernorm"},
        more=_seed_oss,
    ),
    "smollm3": Architecture(class_name="SmolLM3ForCausalLM", model_type="smollm3", permuted=True),
    "stablelm": Architecture(
        class_name="StableLmForCausalLM",
        model_type="stablelm",
        norm="layer",
        epsilon="layer_norm_eps",
        more=_stablelm,
    ),
    "starcoder2": Architecture(
        class_name="Starcoder2ForCausalLM",
        model_type="starcoder2",
        norm="layer",
        epsilon="norm_epsilon",
        activation=_TANH,
        has_windows=True,
        names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        more=_use_bias,
    ),
}
