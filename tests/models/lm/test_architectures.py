"""Architectures against transformers, on all kernels of a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.executor.recorded import record_steps
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.quantization import SCHEMES
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.lm.cases import CASES, OP_BY_OP, peer_of
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import Session, make_decoder, make_kv_caches
from tests.models.lm.peer import random_text
from tests.tiers import sweep

IMPLEMENTATIONS: dict[str, Kernels] = {"reference": ReferenceKernels(), "torch": TorchKernels()}


def native_or_skip() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


@sweep(kernels=[*IMPLEMENTATIONS], case=[*CASES], check=[*CHECKS])
def test_logits_equal_transformers(kernels: str, case: str, check: str) -> None:
    peer = peer_of(case)
    model = make_decoder(peer.hf_config, peer.weights, IMPLEMENTATIONS[kernels])
    CHECKS[check](Session(model), peer)


@sweep(recorded=[False, True], case=[*CASES], check=[*CHECKS])
def test_native_logits_equal_transformers(case: str, check: str, recorded: bool) -> None:
    kernels = native_or_skip()
    peer = peer_of(case)
    model = make_decoder(peer.hf_config, peer.weights, kernels)
    if recorded and case in OP_BY_OP:
        caches = make_kv_caches(model.config, num_pages=4, page_size=8)
        assert OP_BY_OP[case] in record_steps(model, kernels, caches, enabled=True).why
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
    eager = Session(model, dtype=dtype, state_dtype=dtype)
    recorded = Session(model, dtype=dtype, state_dtype=dtype, recorded_by=kernels)
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


@pytest.mark.parametrize("case", ["gpt2", "gpt_bigcode", "bloom", "opt"])
def test_names_may_lack_their_prefix(case: str) -> None:
    """As in the first files of these models."""
    peer, text = peer_of(case), random_text(9)
    prefix = decoder_class(peer.hf_config["architectures"][0]).lacks_prefix
    short = {name.removeprefix(prefix): tensor for name, tensor in peer.weights.items()}
    assert prefix
    assert len(short) == len(peer.weights)
    got = Session(make_decoder(peer.hf_config, short, TorchKernels())).step({"a": text})["a"]
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("iquestcoder", {"clip_qkv": 3.0}, "clip_qkv or use_sliding_window"),
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "asks for apply_residual"),
        ("mpt", {"attn_config": {"qk_ln": True}}, "asks for attn_config.qk_ln"),
        ("mpt", {"attn_config": 3}, "an object as 'attn_config'"),
        ("gptj", {"rotary_dim": 64}, "rotary_dim 64, but a head has 32"),
        ("gpt2", {"add_cross_attention": True}, "asks for add_cross_attention"),
        ("apertus", {"hidden_act": "silu"}, "must have xielu"),
        ("exaone4", {"sliding_window": 8, "sliding_window_pattern": "LX"}, "letters L"),
        ("gemma", {"use_bidirectional_attention": True}, "attend to later ones"),
        ("mixtral", {"num_experts_per_tok": 9}, "experts"),
        ("afmoe", {"n_group": 2}, "asks for experts in groups"),
        ("afmoe", {"score_func": "softmax"}, "asks for score_func 'softmax'"),
        ("dbrx", {"ffn_config": {"moe_normalize_expert_weights": 2}}, "only 1 and null"),
        ("dbrx", {"attn_config": [8]}, "an object as 'attn_config'"),
        ("hunyuan_v1_moe", {"moe_topk": [2, 3]}, "different moe_topk for its layers"),
        ("hunyuan_v1_moe", {"use_cla": True}, "asks for use_cla"),
        ("llama4", {"no_rope_layers": [1, 0]}, "a list of 4 layers as 'no_rope_layers'"),
        ("llama4", {"moe_layers": 2}, "a list of layers as 'moe_layers'"),
        ("mimo_v2_flash", {"swa_head_dim": 16}, "swa_head_dim is 16; only 32"),
        ("mimo_v2_flash", {"mlp_layer_types": ["dense"]}, "whether it has experts"),
        ("mimo_v2_flash", {"v_head_dim": 40}, "values of 40 entries"),
        ("bailing_hybrid", {"kda_lower_bound": 1.0}, "a number below 0 as 'kda_lower_bound'"),
        (
            "bailing_hybrid",
            {"gated_attention_proj_granularity_type": "element_wise"},
            "only 'head_wise' is",
        ),
        ("zamba2", {"num_mem_blocks": 0}, "num_mem_blocks 0 and adapter_rank 8; both must"),
        (
            "zamba2",
            {"num_attention_heads": 7, "attention_head_dim": None},
            "is 7 but must divide twice",
        ),
        ("zamba2", {"layers_block_type": ["hybrid"]}, "for each of its 4 layers"),
        ("minimax_m2", {"attn_type_list": [1, 0]}, "asks for linear attention"),
        ("gemma2", {"attn_logit_softcapping": -1.0}, "number above 0 as 'attn_logit_softcapping'"),
    ],
)
def test_what_an_architecture_does_not_have_is_refused(
    case: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder(peer_of(case).hf_config | fields)


def test_mimo_v2_flash_as_its_first_files_have_it() -> None:
    peer, text = peer_of("mimo_v2_flash"), random_text(40)
    newer = ("layer_types", "mlp_layer_types", "rope_parameters", "sliding_window", "rms_norm_eps")
    hf = {name: value for name, value in peer.hf_config.items() if name not in newer}
    hf |= {
        "hybrid_layer_pattern": [0, 1, 1],
        "moe_layer_freq": [0, 1, 1],
        "sliding_window_size": peer.hf_config["sliding_window"] - 1,
        "layernorm_epsilon": 1e-5,
        "rope_theta": 5_000_000,
        "swa_rope_theta": 10_000,
        "swa_num_key_value_heads": 2,
        "routed_scaling_factor": None,
    }
    assert any(name.endswith("attention_sink_bias") for name in peer.weights)
    got = Session(make_decoder(hf, peer.weights, TorchKernels())).step({"a": text})["a"]
    torch.testing.assert_close(got, peer.logits(text), atol=1e-4, rtol=0)


def test_gemma2_fields_that_are_absent_have_gemma2s_meaning() -> None:
    absent = ("layer_types", "sliding_window", "attn_logit_softcapping", "head_dim")
    hf = {name: value for name, value in peer_of("gemma2").hf_config.items() if name not in absent}
    config = read_decoder({**hf, "max_position_embeddings": 8192})
    assert [config.window_of(layer) for layer in range(3)] == [4096, None, 4096]
    assert (config.soft_cap, config.head_dim) == (50.0, 256)
