"""Ling 2.5 and Ring Linear against their formulas."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.convert.walk import Walk
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.registry import decoder_class, read_decoder
from tests.models.lm.bailing_linear import LING, RING, peer, shapes
from tests.models.lm.checks import CHECKS
from tests.models.lm.harness import CPU, Session, make_decoder
from tests.models.lm.peer import random_text
from tests.models.lm.test_architectures import native_or_skip
from tests.tiers import sweep

PUBLISHED = {
    "architectures": ["BailingMoeV2_5ForCausalLM"],
    "first_k_dense_replace": 1,
    "group_norm_size": 4,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 9216,
    "kv_lora_rank": 512,
    "layer_group_size": 8,
    "linear_silu": False,
    "max_position_embeddings": 131_072,
    "moe_intermediate_size": 1024,
    "n_group": 8,
    "num_attention_heads": 32,
    "num_experts": 256,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "num_shared_experts": 1,
    "partial_rotary_factor": 0.5,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-6,
    "rope_interleave": True,
    "rope_theta": 6e6,
    "topk_group": 4,
    "use_qk_norm": True,
    "v_head_dim": 128,
    "vocab_size": 157_184,
}
"""Such as a published config.json."""


def kernels_called(name: str) -> Kernels:
    if name in ("native", "recorded"):
        return native_or_skip()
    return {"reference": ReferenceKernels, "torch": TorchKernels}[name]()


@sweep(name=["ling", "ring"], kernels=["reference", "torch", "native", "recorded"], check=[*CHECKS])
def test_logits_equal_the_formulas(name: str, kernels: str, check: str) -> None:
    own = kernels_called(kernels)
    model = make_decoder(peer(name).hf_config, peer(name).weights, own)
    recorded_by = own if kernels == "recorded" else None
    CHECKS[check](Session(model, recorded_by=recorded_by), peer(name))


@pytest.mark.parametrize("name", ["ling", "ring"])
def test_a_recorded_step_equals_its_ops_bit_by_bit(name: str) -> None:
    kernels, dtype = native_or_skip(), torch.bfloat16
    weights = {tensor: weight.to(dtype) for tensor, weight in peer(name).weights.items()}
    model = make_decoder(peer(name).hf_config, weights, kernels, dtype=dtype)
    eager = Session(model, dtype=dtype, state_dtype=dtype)
    recorded = Session(model, dtype=dtype, state_dtype=dtype, recorded_by=kernels)
    for step in (
        {"a": random_text(40)},
        {"a": [5], "b": random_text(19, seed=1), "c": random_text(3, seed=2)},
        {"a": [6], "b": [7], "c": [8]},
    ):
        expected, got = eager.step(step), recorded.step(step)
        assert all(torch.equal(expected[text], got[text]) for text in step)


@pytest.mark.parametrize("hf", [LING, RING], ids=["ling", "ring"])
def test_a_checkpoint_has_these_tensors_and_no_others(hf: dict[str, Any]) -> None:
    name = "ling" if hf is LING else "ring"
    model = make_decoder(hf, peer(name).weights, TorchKernels())
    wanted = {model.checkpoint_name(tensor): shape for tensor, shape in shapes(hf).items()}
    assert {tensor: target.shape for tensor, target in model.targets().items()} == wanted


def test_layers_in_pauses_are_the_layers() -> None:
    """A conversion computes a layer in steps, between which it looks at inputs."""
    build = Build(kernels=TorchKernels(), device=CPU, dtype=torch.float32)
    config, weights = read_decoder(RING), peer("ring").weights
    walk = Walk(decoder_class(config.architecture)(config, build), window=40, page_size=8)
    hidden = walk.embed(weights, [torch.tensor(random_text(40))])
    for index in range(walk.num_layers):
        layer = walk.layer(index, weights)
        *_, (stepped,) = walk.steps(layer, hidden)
        hidden = walk.run(layer, hidden)
        torch.testing.assert_close(stepped, hidden[0])


def test_the_facts_of_a_large_config() -> None:
    config = read_decoder(PUBLISHED)
    assert 95e9 < config.num_parameters < 115e9
    assert [layer for layer in range(32) if layer not in config.layers_with_states] == [
        7, 15, 23, 31,
    ]  # fmt: skip
    (states,) = config.states
    assert {name: tensor.shape for name, tensor in states.tensors.items()} == {
        "state": (32, 128, 128)
    }


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"linear_silu": True}, "linear_silu is True; only False"),
        ({"use_bias": True}, "use_bias is True"),
        ({"linear_rope": False}, "linear_rope is False"),
        ({"layer_group_size": 0}, "layer_group_size 0"),
        ({"head_dim": -1}, "head_dim"),
        ({"layer_types": ["linear_attention"]}, "each of its 5 layers"),
    ],
)
def test_what_is_not_implemented_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder({**RING, **fields})


def test_norms_must_fit_the_heads() -> None:
    with pytest.raises(ConfigError, match="over 5 groups"):
        make_decoder({**RING, "group_norm_size": 5}, peer("ring").weights, TorchKernels())
