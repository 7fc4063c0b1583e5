"""Architectures against transformers, on all kernels of a CPU."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.executor.graphs import choose_graph
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.quantization import SCHEMES
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder, make_kv_caches
from tests.models.lm.peer import Peer, make_peer, random_text

WINDOW = 24
"""Shorter than the texts, and no multiple of a page."""


def longrope(num_pairs: int, original_length: int) -> dict[str, Any]:
    return {
        "rope_type": "longrope",
        "rope_theta": 10000.0,
        "original_max_position_embeddings": original_length,
        "short_factor": [1.0 + index / 20 for index in range(num_pairs)],
        "long_factor": [1.5 + index / 4 for index in range(num_pairs)],
    }


FALCON = {"hidden_size": 192, "ffn_hidden_size": 80, "head_dim": None}

CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mistral, window": ("mistral", "MistralForCausalLM", {"sliding_window": WINDOW}),
    "qwen2, window in one layer": (
        "qwen2",
        "Qwen2ForCausalLM",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4}),
    "mixtral, window": (
        "mixtral",
        "MixtralForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 3, "sliding_window": WINDOW},
    ),
    "gemma": ("gemma", "GemmaForCausalLM", {}),
    "gemma2": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "num_hidden_layers": 3,
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 2.0,
            "final_logit_softcapping": 1.5,
        },
    ),
    "gemma2, no caps": (
        "gemma2",
        "Gemma2ForCausalLM",
        {
            "sliding_window": WINDOW,
            "attn_logit_softcapping": None,
            "final_logit_softcapping": None,
        },
    ),
    "granite": (
        "granite",
        "GraniteForCausalLM",
        {
            "attention_bias": True,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 3.0,
            "residual_multiplier": 0.4,
            "logits_scaling": 2.5,
        },
    ),
    "phi3, short": (
        "phi3",
        "Phi3ForCausalLM",
        {"hidden_size": 192, "rope_parameters": longrope(16, 256), "pad_token_id": None},
    ),
    "phi3, long": (
        "phi3",
        "Phi3ForCausalLM",
        {
            "hidden_size": 192,
            "rope_parameters": {**longrope(12, 8), "partial_rotary_factor": 0.75},
            "original_max_position_embeddings": 8,
            "sliding_window": WINDOW,
            "pad_token_id": None,
        },
    ),
    "phi": ("phi", "PhiForCausalLM", {"hidden_size": 192}),
    "phi, norms of heads": ("phi", "PhiForCausalLM", {"hidden_size": 192, "qk_layernorm": True}),
    "gemma3": (
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "query_pre_attn_scalar": 24,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo2": ("olmo2", "Olmo2ForCausalLM", {}),
    "smollm3": (
        "smollm3",
        "SmolLM3ForCausalLM",
        {"no_rope_layer_interval": 2, "pad_token_id": None},
    ),
    "smollm3, window": (
        "smollm3",
        "SmolLM3ForCausalLM",
        {
            "no_rope_layers": [0, 1],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
            "attention_bias": True,
            "pad_token_id": None,
        },
    ),
    "stablelm": ("stablelm", "StableLmForCausalLM", {"hidden_size": 192, "use_qkv_bias": True}),
    "apertus": ("apertus", "ApertusForCausalLM", {}),
    "arcee": ("arcee", "ArceeForCausalLM", {"mlp_bias": True}),
    "bloom": ("bloom", "BloomForCausalLM", {"hidden_size": 192}),
    "cohere": ("cohere", "CohereForCausalLM", {"hidden_size": 192, "logit_scale": 0.25}),
    "cohere, norms of heads": (
        "cohere",
        "CohereForCausalLM",
        {"hidden_size": 192, "logit_scale": 1.0, "use_qk_norm": True, "attention_bias": True},
    ),
    "cohere2": (
        "cohere2",
        "Cohere2ForCausalLM",
        {
            "hidden_size": 192,
            "logit_scale": 1.0,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
        },
    ),
    "cwm": (
        "cwm",
        "CwmForCausalLM",
        {
            "layer_types": ["full_attention", "sliding_attention"],
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
    "ernie4_5": ("ernie4_5", "Ernie4_5ForCausalLM", {"use_bias": True}),
    "exaone4": (
        "exaone4",
        "Exaone4ForCausalLM",
        {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    ),
    "exaone4, window": (
        "exaone4",
        "Exaone4ForCausalLM",
        {"num_hidden_layers": 4, "sliding_window": WINDOW},
    ),
    "falcon": ("falcon", "FalconForCausalLM", FALCON),
    "falcon, two norms": (
        "falcon",
        "FalconForCausalLM",
        {**FALCON, "new_decoder_architecture": True, "num_kv_heads": 2, "bias": True},
    ),
    "falcon, one norm": (
        "falcon",
        "FalconForCausalLM",
        {
            **FALCON,
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
        },
    ),
    "falcon, alibi": (
        "falcon",
        "FalconForCausalLM",
        {**FALCON, "alibi": True, "multi_query": False, "parallel_attn": False, "bias": True},
    ),
    "glm": ("glm", "GlmForCausalLM", {"pad_token_id": None}),
    "glm4": ("glm4", "Glm4ForCausalLM", {"pad_token_id": None}),
    "gpt2": ("gpt2", "GPT2LMHeadModel", {"hidden_size": 192}),
    "gpt2, scales by layer": (
        "gpt2",
        "GPT2LMHeadModel",
        {"hidden_size": 192, "n_inner": 80, "scale_attn_by_inverse_layer_idx": True},
    ),
    "gpt_bigcode": ("gpt_bigcode", "GPTBigCodeForCausalLM", {"hidden_size": 192}),
    "gpt_bigcode, all heads": (
        "gpt_bigcode",
        "GPTBigCodeForCausalLM",
        {"hidden_size": 192, "multi_query": False},
    ),
    "gpt_neox": ("gpt_neox", "GPTNeoXForCausalLM", {"hidden_size": 192}),
    "gpt_neox, in sequence": (
        "gpt_neox",
        "GPTNeoXForCausalLM",
        {"hidden_size": 192, "use_parallel_residual": False, "attention_bias": False},
    ),
    "gptj": ("gptj", "GPTJForCausalLM", {"hidden_size": 192, "rotary_dim": 12}),
    "helium": ("helium", "HeliumForCausalLM", {"hidden_size": 192, "pad_token_id": None}),
    "hunyuan": (
        "hunyuan_v1_dense",
        "HunYuanDenseV1ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "dynamic",
                "alpha": 50.0,
                "rope_theta": 1e4,
                "factor": 1.0,
            }
        },
    ),
    "ministral": (
        "ministral",
        "MinistralForCausalLM",
        {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": WINDOW},
    ),
    "ministral3": (
        "ministral3",
        "Ministral3ForCausalLM",
        {
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 1e4,
                "factor": 16.0,
                "original_max_position_embeddings": 16,
                "llama_4_scaling_beta": 0.3,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
            },
        },
    ),
    "mpt": (
        "mpt",
        "MptForCausalLM",
        {
            "hidden_size": 192,
            "max_seq_len": 256,
            "attn_config": {"clip_qkv": 1.5, "softmax_scale": 0.3},
        },
    ),
    "mpt, uncut": (
        "mpt",
        "MptForCausalLM",
        {"hidden_size": 192, "max_seq_len": 256},
    ),
    "nemotron": ("nemotron", "NemotronForCausalLM", {}),
    "olmo": ("olmo", "OlmoForCausalLM", {"hidden_size": 192, "pad_token_id": None}),
    "olmo, cut": (
        "olmo",
        "OlmoForCausalLM",
        {"hidden_size": 192, "clip_qkv": 0.8, "pad_token_id": None},
    ),
    "olmo3": (
        "olmo3",
        "Olmo3ForCausalLM",
        {
            "hidden_size": 192,
            "num_hidden_layers": 4,
            "sliding_window": WINDOW,
            "pad_token_id": None,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "opt": ("opt", "OPTForCausalLM", {"hidden_size": 192, "ffn_dim": 80}),
    "opt, no biases": (
        "opt",
        "OPTForCausalLM",
        {
            "hidden_size": 192,
            "ffn_dim": 80,
            "enable_bias": False,
            "layer_norm_elementwise_affine": False,
        },
    ),
    "persimmon": ("persimmon", "PersimmonForCausalLM", {"hidden_size": 192}),
    "seed_oss": ("seed_oss", "SeedOssForCausalLM", {"attention_out_bias": True, "mlp_bias": True}),
    "stablelm, parallel": (
        "stablelm",
        "StableLmForCausalLM",
        {"hidden_size": 192, "use_parallel_residual": True, "qk_layernorm": True},
    ),
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "starcoder2, no biases": ("starcoder2", "Starcoder2ForCausalLM", {"use_bias": False}),
}
OP_BY_OP = {
    "mixtral": "experts are computed op by op",
    "mixtral, window": "experts are computed op by op",
    "olmo2": "norms of queries and keys",
    "phi, norms of heads": "norms of queries and keys",
    "apertus": "xIELU",
    "cohere, norms of heads": "norms of queries and keys",
    "gpt2": "learned positions",
    "gpt2, scales by layer": "learned positions",
    "gpt_bigcode": "learned positions",
    "gpt_bigcode, all heads": "learned positions",
    "hunyuan": "norms after the rotation",
    "ministral3": "factors of queries by position",
    "mpt": "clipped projections",
    "olmo, cut": "clipped projections",
    "olmo3": "norms of queries and keys",
    "opt": "learned positions",
    "opt, no biases": "learned positions",
    "persimmon": "norms of queries and keys",
    "stablelm, parallel": "norms of queries and keys",
}
"""Cases whose steps are not recorded, and why."""


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = CASES[case]
    fields = {"head_dim": 32} | fields
    if fields["head_dim"] is None:  # a property of the configuration, which cannot be set
        del fields["head_dim"]
    return make_peer(model_type, architecture, **fields)


def native_or_skip() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", [ReferenceKernels(), TorchKernels()], ids=lambda k: k.name)
def test_logits_equal_transformers(kernels: Kernels, case: str, check: str) -> None:
    peer = peer_of(case)
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, kernels)), peer)


@pytest.mark.parametrize("recorded", [False, True], ids=["op by op", "recorded"])
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", CASES)
def test_native_logits_equal_transformers(case: str, check: str, recorded: bool) -> None:
    kernels = native_or_skip()
    peer = peer_of(case)
    model = make_decoder(peer.hf_config, peer.weights, kernels)
    if recorded and case in OP_BY_OP:
        caches = make_kv_caches(model.config, num_pages=4, page_size=8)
        assert OP_BY_OP[case] in choose_graph(model, kernels, caches, enabled=True).why
        return
    CHECKS[check](Session(model, recorded_by=kernels if recorded else None), peer)


@pytest.mark.parametrize("scheme", ["none", "w8a8_int8"])
@pytest.mark.parametrize("case", [case for case in CASES if case not in OP_BY_OP])
def test_a_recorded_step_equals_its_ops_bit_by_bit(case: str, scheme: str) -> None:
    """In bfloat16, where another order of operations would show; a prompt, a mixture, decodes."""
    kernels = native_or_skip()
    peer, dtype = peer_of(case), torch.bfloat16
    weights = {name: weight.to(dtype) for name, weight in peer.weights.items()}
    how = SCHEMES.get(scheme)()
    model = make_decoder(peer.hf_config, weights, kernels, dtype=dtype, scheme=how)
    eager = Session(model, dtype=dtype)
    recorded = Session(model, dtype=dtype, recorded_by=kernels)
    for step in (
        {"a": random_text(40)},
        {"a": [5], "b": random_text(19, seed=1), "c": random_text(3, seed=2)},
        {"a": [6], "b": [7], "c": [8]},
        {"a": [9]},
    ):
        expected, got = eager.step(step), recorded.step(step)
        for name in step:
            assert torch.equal(expected[name], got[name]), name


@pytest.mark.parametrize("case", ["mixtral", "gemma2", "starcoder2"])
def test_a_model_that_is_filled_again_is_a_new_one(case: str) -> None:
    """Also with a scheme that stores weights in another form."""
    kernels = native_or_skip()
    peer = peer_of(case)
    other = {name: torch.roll(tensor, 1, 0) * 0.7 for name, tensor in peer.weights.items()}
    text = {"a": random_text(30)}
    for scheme in ("none", "w8a8_int8"):
        how = SCHEMES.get(scheme)()
        model = make_decoder(peer.hf_config, peer.weights, kernels, scheme=how)
        before = Session(model).step(text)["a"]
        load_weights(model, other.items())
        model.finalize()
        fresh = make_decoder(peer.hf_config, other, kernels, scheme=how)
        after = Session(model).step(text)["a"]
        assert torch.equal(after, Session(fresh).step(text)["a"])
        assert not torch.equal(after, before)
        if case not in OP_BY_OP:
            recorded = Session(model, recorded_by=kernels).step(text)["a"]
            assert torch.equal(recorded, after)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("opt", {"word_embed_proj_dim": 20}, "word_embed_proj_dim unlike hidden_size"),
        ("opt", {"do_layer_norm_before": False}, "norms after the layers"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "asks for apply_residual"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "asks for attn_config.qk_ln"),
        ("mpt", {"attn_config": 3}, "an object as 'attn_config'"),
        ("gptj", {"rotary_dim": 64}, "rotary_dim 64, but a head has 32"),
        ("gpt2", {"add_cross_attention": True}, "asks for add_cross_attention"),
        ("apertus", {"hidden_act": "silu"}, "must have xielu"),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LX"}, "letters L"),
        ("gemma", {"use_bidirectional_attention": True}, "attend to later ones"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "number above 0 as 'attn_logit_softcapping'"),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(
    case: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder(peer_of(case).hf_config | fields)


def test_gemma2_fields_that_are_absent_have_gemma2s_meaning() -> None:
    absent = ("layer_types", "sliding_window", "attn_logit_softcapping", "head_dim")
    hf = {name: value for name, value in peer_of("gemma2").hf_config.items() if name not in absent}
    config = read_decoder({**hf, "max_position_embeddings": 8192})
    assert [config.window_of(layer) for layer in range(3)] == [4096, None, 4096]
    assert (config.soft_cap, config.head_dim) == (50.0, 256)
