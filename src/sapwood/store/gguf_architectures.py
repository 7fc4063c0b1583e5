"""What GGUF files of each architecture hold, in the words of Hugging Face's. No torch.

Names and keys: gguf-py's constants. llama.cpp has one way to rotate per architecture: where it
rotates neighbouring pairs and Hugging Face's model halves, rows of queries and keys were put in
another order when the file was made. Its norms multiply by their weight, so 1 was added to weights
that are differences from 1. Matrices are [out, in], and a fused projection has all queries, all
keys, then all values, whatever Hugging Face's files have; the field `gguf_projections` of
the config.json that is made of a file says so to the model's class.
"""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.store import gguf_fields
from sapwood.store.gguf_architecture import Architecture
from sapwood.store.gguf_delta import DENSE as DELTA
from sapwood.store.gguf_states import STATES

_NORMS_AFTER = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GEMMA_NORMS = {**_NORMS_AFTER, "ffn_norm": "pre_feedforward_layernorm"}
_GEMMA3N_NAMES = {
    **_GEMMA_NORMS,
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "altup_proj": "model.altup_projections.{}",
    "altup_unembd_proj": "model.altup_unembed_projections.{}",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale.weight": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
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

_GPT2_NAMES = {
    "token_embd": "transformer.wte",
    "position_embd": "transformer.wpe",
    "output_norm": "transformer.ln_f",
    "attn_norm": "ln_1",
    "attn_qkv": "attn.c_attn",
    "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn_up": "mlp.c_fc",
    "ffn_down": "mlp.c_proj",
}
_NEOX_NAMES = {
    "token_embd": "gpt_neox.embed_in",
    "output_norm": "gpt_neox.final_layer_norm",
    "output": "embed_out",
    "attn_qkv": "attention.query_key_value",
    "attn_output": "attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_BLOOM_NAMES = {
    "token_embd": "transformer.word_embeddings",
    "token_embd_norm": "transformer.word_embeddings_layernorm",
    "output_norm": "transformer.ln_f",
    "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense",
    "ffn_up": "mlp.dense_h_to_4h",
    "ffn_down": "mlp.dense_4h_to_h",
}
_CHATGLM_NAMES = {
    **{name: own for name, own in _BLOOM_NAMES.items() if not name.startswith("token_embd")},
    "token_embd": "transformer.embedding.word_embeddings",
    "output_norm": "transformer.encoder.final_layernorm",
    "output": "transformer.output_layer",
    "attn_q": "self_attention.q_proj",
    "attn_k": "self_attention.k_proj",
    "attn_v": "self_attention.v_proj",
}
_MPT_NAMES = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.norm_f",
    "attn_norm": "norm_1",
    "attn_qkv": "attn.Wqkv",
    "attn_output": "attn.out_proj",
    "ffn_norm": "norm_2",
    "ffn_up": "ffn.up_proj",
    "ffn_down": "ffn.down_proj",
}
_EXAONE_NAMES = {
    "token_embd": "transformer.wte",
    "output_norm": "transformer.ln_f",
    "attn_norm": "ln_1",
    "attn_q": "attn.attention.q_proj",
    "attn_k": "attn.attention.k_proj",
    "attn_v": "attn.attention.v_proj",
    "attn_output": "attn.attention.out_proj",
    "ffn_norm": "ln_2",
    "ffn_gate": "mlp.c_fc_0",
    "ffn_up": "mlp.c_fc_1",
    "ffn_down": "mlp.c_proj",
}
_LFM2_NAMES = {
    "token_embd_norm": "model.embedding_norm",
    "attn_norm": "operator_norm",
    "attn_output": "self_attn.out_proj",
    "attn_q_norm": "self_attn.q_layernorm",
    "attn_k_norm": "self_attn.k_layernorm",
    "shortconv.conv": "conv.conv",
    "shortconv.in_proj": "conv.in_proj",
    "shortconv.out_proj": "conv.out_proj",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "feed_forward.w1",
    "ffn_up": "feed_forward.w3",
    "ffn_down": "feed_forward.w2",
}

_TANH = "gelu_pytorch_tanh"
_FACTORS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(class_name="LlamaForCausalLM", model_type="llama", permuted=True),
    "mistral3": Architecture(
        class_name="MistralForCausalLM", model_type="mistral", permuted=True, has_windows=True
    ),
    "qwen2": Architecture(class_name="Qwen2ForCausalLM", model_type="qwen2"),
    "qwen3": Architecture(class_name="Qwen3ForCausalLM", model_type="qwen3"),
    "apertus": Architecture(
        class_name="ApertusForCausalLM",
        model_type="apertus",
        activation="xielu",
        names={"attn_norm": "attention_layernorm", "ffn_norm": "feedforward_layernorm"},
        more=gguf_fields.apertus,
    ),
    "arcee": Architecture(
        class_name="ArceeForCausalLM", model_type="arcee", permuted=True, activation="relu2"
    ),
    "baichuan": Architecture(
        class_name="BaichuanForCausalLM",
        model_type="baichuan",
        known_as=("BaiChuanForCausalLM",),
        permuted=True,
        more=gguf_fields.baichuan,
    ),
    "bloom": Architecture(
        class_name="BloomForCausalLM",
        model_type="bloom",
        norm="layer",
        activation=_TANH,
        layers="transformer.h",
        names=_BLOOM_NAMES,
    ),
    "chatglm": Architecture(
        class_name="ChatGLMModel",
        model_type="chatglm",
        known_as=("ChatGLMForConditionalGeneration", "GlmForCausalLM"),
        layers="transformer.encoder.layers",
        names=_CHATGLM_NAMES,
        more=gguf_fields.chatglm,
    ),
    "cohere2": Architecture(
        class_name="Cohere2ForCausalLM",
        model_type="cohere2",
        norm="layer",
        has_windows=True,
        reads=("logit_scale",),
        more=gguf_fields.cohere,
    ),
    "command-r": Architecture(
        class_name="CohereForCausalLM",
        model_type="cohere",
        norm="layer",
        reads=("logit_scale",),
        more=gguf_fields.cohere,
    ),
    "deci": Architecture(
        class_name="DeciLMForCausalLM", model_type="nemotron-nas", permuted=True, differs=True
    ),
    "ernie4_5": Architecture(
        class_name="Ernie4_5ForCausalLM", model_type="ernie4_5", more=gguf_fields.use_bias
    ),
    "exaone": Architecture(
        class_name="ExaoneForCausalLM",
        model_type="exaone",
        layers="transformer.h",
        names=_EXAONE_NAMES,
    ),
    "exaone4": Architecture(
        class_name="Exaone4ForCausalLM",
        model_type="exaone4",
        has_windows=True,
        names=_NORMS_AFTER,
        more=gguf_fields.exaone4,
    ),
    "falcon": Architecture(
        class_name="FalconForCausalLM",
        model_type="falcon",
        norm="layer",
        activation="gelu",
        layers="transformer.h",
        names={
            **{name: own for name, own in _BLOOM_NAMES.items() if name != "token_embd_norm"},
            "attn_norm_2": "ln_attn",
        },
        more=gguf_fields.falcon,
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
        more=gguf_fields.gemma2,
    ),
    "gemma3": Architecture(
        class_name="Gemma3ForCausalLM",
        model_type="gemma3_text",
        adds_one=True,
        activation=_TANH,
        has_windows=True,
        names=_GEMMA_NORMS,
        more=gguf_fields.gemma3,
    ),
    "gemma3n": Architecture(
        class_name="Gemma3nForCausalLM",
        model_type="gemma3n_text",
        activation=_TANH,
        has_windows=True,
        names=_GEMMA3N_NAMES,
        more=gguf_fields.gemma3n,
    ),
    "glm4": Architecture(class_name="Glm4ForCausalLM", model_type="glm4", names=_GLM4_NAMES),
    "gpt2": Architecture(
        class_name="GPT2LMHeadModel",
        model_type="gpt2",
        norm="layer",
        activation=_TANH,
        layers="transformer.h",
        names=_GPT2_NAMES,
    ),
    "gptneox": Architecture(
        class_name="GPTNeoXForCausalLM",
        model_type="gpt_neox",
        norm="layer",
        activation="gelu",
        layers="gpt_neox.layers",
        names=_NEOX_NAMES,
        more=gguf_fields.gpt_neox,
    ),
    "granite": Architecture(
        class_name="GraniteForCausalLM",
        model_type="granite",
        permuted=True,
        reads=_FACTORS,
        more=gguf_fields.granite,
    ),
    "hunyuan-dense": Architecture(
        class_name="HunYuanDenseV1ForCausalLM",
        model_type="hunyuan_v1_dense",
        names={
            "attn_q_norm": "self_attn.query_layernorm",
            "attn_k_norm": "self_attn.key_layernorm",
        },
    ),
    "internlm2": Architecture(
        class_name="LlamaForCausalLM",
        model_type="llama",
        known_as=("InternLM2ForCausalLM",),
        permuted=True,
    ),
    "lfm2": Architecture(
        class_name="Lfm2ForCausalLM",
        model_type="lfm2",
        mixes=True,
        names=_LFM2_NAMES,
        more=gguf_fields.lfm2,
    ),
    "minicpm": Architecture(
        class_name="MiniCPMForCausalLM",
        model_type="minicpm",
        permuted=True,
        reads=_FACTORS[1:],
        more=gguf_fields.minicpm,
    ),
    "mpt": Architecture(
        class_name="MptForCausalLM",
        model_type="mpt",
        norm="layer",
        activation="gelu",
        layers="transformer.blocks",
        names=_MPT_NAMES,
        reads=("attention.clamp_kqv",),
        more=gguf_fields.mpt,
    ),
    "nemotron": Architecture(
        class_name="NemotronForCausalLM",
        model_type="nemotron",
        adds_one=True,
        norm="layer",
        activation="relu2",
    ),
    "olmo": Architecture(
        class_name="OlmoForCausalLM",
        model_type="olmo",
        permuted=True,
        norm="layer",
        reads=("attention.clamp_kqv",),
        more=gguf_fields.olmo,
    ),
    "olmo2": Architecture(
        class_name="Olmo2ForCausalLM",
        model_type="olmo2",
        known_as=("Olmo3ForCausalLM",),
        has_windows=True,
        names=_NORMS_AFTER,
        more=gguf_fields.olmo2,
    ),
    "orion": Architecture(class_name="OrionForCausalLM", model_type="orion", norm="layer"),
    "phi2": Architecture(
        class_name="PhiForCausalLM",
        model_type="phi",
        norm="layer",
        activation="gelu_new",
        names=_PHI2_NAMES,
    ),
    "phi3": Architecture(
        class_name="Phi3ForCausalLM",
        model_type="phi3",
        has_windows=True,
        names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"},
    ),
    "qwen": Architecture(
        class_name="QWenLMHeadModel",
        model_type="qwen",
        layers="transformer.h",
        names={
            **{name: own for name, own in _GPT2_NAMES.items() if name != "position_embd"},
            "ffn_gate": "mlp.w2",
            "ffn_up": "mlp.w1",
        },
    ),
    "seed_oss": Architecture(
        class_name="SeedOssForCausalLM",
        model_type="seed_oss",
        names={"post_attention_norm": "post_attention_layernorm"},
        more=gguf_fields.seed_oss,
    ),
    "smollm3": Architecture(class_name="SmolLM3ForCausalLM", model_type="smollm3", permuted=True),
    "stablelm": Architecture(
        class_name="StableLmForCausalLM",
        model_type="stablelm",
        norm="layer",
        more=gguf_fields.stablelm,
    ),
    "starcoder": Architecture(
        class_name="GPTBigCodeForCausalLM",
        model_type="gpt_bigcode",
        norm="layer",
        activation=_TANH,
        layers="transformer.h",
        names=_GPT2_NAMES,
        more=gguf_fields.gpt_bigcode,
    ),
    "starcoder2": Architecture(
        class_name="Starcoder2ForCausalLM",
        model_type="starcoder2",
        norm="layer",
        activation=_TANH,
        has_windows=True,
        names={"ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj"},
        more=gguf_fields.use_bias,
    ),
    "xverse": Architecture(class_name="XverseForCausalLM", model_type="xverse", permuted=True),
    **DELTA,
    **STATES,
}
