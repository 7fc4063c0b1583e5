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
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"shared_expert_intermediate_size": 56, "mlp_only_layers": [0]},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 40}
        | {"norm_topk_prob": True},
    ),
    "olmoe": (
        "olmoe",
        "OlmoeForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "hidden_size": 192},
    ),
    "flex_olmo": (
        "flex_olmo",
        "FlexOlmoForCausalLM",
        {"num_experts": 5, "num_experts_per_tok": 2, "pad_token_id": None},
    ),
    "granitemoe": (
        "granitemoe",
        "GraniteMoeForCausalLM",
        {"num_local_experts": 5, "residual_multiplier": 0.4, "attention_multiplier": 0.2},
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 1.5, "use_qk_norm": True}
        | {"n_shared_experts": 2, "attention_bias": True},
    ),
    "dots1": (
        "dots1",
        "Dots1ForCausalLM",
        {"n_routed_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 40}
        | {"n_group": 1, "topk_group": 1, "n_shared_experts": 1, "first_k_dense_replace": 1},
    ),
    "gpt_oss": (
        "gpt_oss",
        "GptOssForCausalLM",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": WINDOW},
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
    "starcoder2": ("starcoder2", "Starcoder2ForCausalLM", {"sliding_window": WINDOW}),
    "starcoder2, no biases": ("starcoder2", "Starcoder2ForCausalLM", {"use_bias": False}),
}
OP_BY_OP = {
    "flex_olmo": "norms over all heads",
    "olmo2": "norms over all heads",
    "olmoe": "norms over all heads",
}
"""Cases whose steps are not recorded, and why."""


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = CASES[case]
    return make_peer(model_type, architecture, **({"head_dim": 32} | fields))


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
        ("stablelm", {"qk_layernorm": True}, "asks for qk_layernorm, which is not implemented"),
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
