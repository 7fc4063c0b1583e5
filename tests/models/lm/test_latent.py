"""Latent attention: both of its forms give transformers' logits, whichever requests have which."""

from __future__ import annotations

import pytest
import torch

from sapwood.base.errors import ConfigError
from sapwood.executor.recorded import record_steps
from sapwood.kernels.latent import LatentSizes
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.registry import read_decoder
from tests.models.lm.cases import peer_of
from tests.models.lm.checks import ATOL, CHECKS
from tests.models.lm.harness import NewTokens, Session, make_batch, make_decoder, make_kv_caches
from tests.models.lm.peer import random_text
from tests.models.lm.test_architectures import native_or_skip
from tests.tiers import sweep

CASES = ["youtu", "youtu, queries without a latent", "minicpm3", "deepseek_v3"]


@sweep(case=CASES, check=[*CHECKS], expands=["all", "long"])
def test_expanded_logits_equal_transformers(
    case: str, check: str, expands: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rule would never choose this form for texts as short as these."""
    fewest = {"all": 1, "long": 15}[expands]
    monkeypatch.setattr(LatentSizes, "expands", lambda _, num_new, __: num_new >= fewest)
    peer = peer_of(case)
    kernels = TorchKernels() if expands == "long" else ReferenceKernels()
    CHECKS[check](Session(make_decoder(peer.hf_config, peer.weights, kernels)), peer)


def test_one_head_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.layers.latent_attention._EXPANDED_BYTES", 1)
    monkeypatch.setattr(LatentSizes, "expands", lambda *_: True)
    peer, text = peer_of("youtu"), random_text(40)
    got = Session(make_decoder(peer.hf_config, peer.weights, TorchKernels())).step({"a": text})
    torch.testing.assert_close(got["a"], peer.logits(text), atol=ATOL, rtol=0)


def test_a_recorded_step_leaves_long_prompts_out(monkeypatch: pytest.MonkeyPatch) -> None:
    peer = peer_of("deepseek_v2, lite")
    kernels = native_or_skip()
    model = make_decoder(peer.hf_config, peer.weights, kernels)
    caches = make_kv_caches(model.config, num_pages=8, page_size=8)
    steps = record_steps(model, kernels, caches, enabled=True).steps
    monkeypatch.setattr(LatentSizes, "expands", lambda _, num_new, __: num_new > 2)
    short, long = NewTokens([1, 2], 0, [1]), NewTokens([1, 2, 3], 0, [2])
    assert steps.replay(make_batch([short, long], caches)) is None
    assert all(cache.isnan().all() for own in caches for cache in own)
    assert steps.replay(make_batch([short], caches)) is not None


@pytest.mark.parametrize("is_expanded", [False, True])
@pytest.mark.parametrize("name", ["int8", "float8_e4m3fn"])
def test_rows_in_8_bits(name: str, is_expanded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Near the logits of exact rows, and in both forms the same."""
    peer, text, dtype = peer_of("youtu"), random_text(60), getattr(torch, name)
    model = make_decoder(peer.hf_config, peer.weights, TorchKernels())
    absorbed = Session(model, dtype=dtype).in_chunks("a", text, 20)
    monkeypatch.setattr(LatentSizes, "expands", lambda *_: is_expanded)
    got = Session(model, dtype=dtype).in_chunks("a", text, 20)
    torch.testing.assert_close(got, absorbed, atol=ATOL, rtol=0)
    away = (got - peer.logits(text)).std() / peer.logits(text).std()
    assert 1e-4 < away < (0.05 if name == "int8" else 0.1)


def test_a_quantised_layer_of_keys_and_values_is_decoded() -> None:
    peer, text = peer_of("youtu"), random_text(40)
    kernels, name = TorchKernels(), "model.layers.0.self_attn.kv_b_proj.weight"
    quantised = kernels.quantize_weight(peer.weights[name], "int8")
    decoded = {**peer.weights, name: quantised.dequantized(torch.float32)}
    expected = Session(make_decoder(peer.hf_config, decoded, kernels)).step({"a": text})["a"]
    model = make_decoder(peer.hf_config, {**peer.weights, name: quantised}, kernels)
    assert torch.equal(Session(model).step({"a": text})["a"], expected)


@pytest.mark.parametrize(
    ("case", "fields", "message"),
    [
        ("youtu", {"kv_lora_rank": None}, "an integer 'kv_lora_rank'"),
        ("youtu", {"kv_lora_rank": 0}, "must be >= 1"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "dense or sparse for each"),
    ],
)
def test_impossible_sizes_are_refused(case: str, fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_decoder(peer_of(case).hf_config | fields)


def test_the_layer_after_the_last_one_is_left_out() -> None:
    peer, text = peer_of("deepseek_v3"), random_text(20)
    more = {"model.layers.2.eh_proj.weight": torch.zeros(3, 4)}
    model = make_decoder(peer.hf_config, peer.weights | more, TorchKernels())
    got = Session(model).step({"a": text})["a"]
    torch.testing.assert_close(got, peer.logits(text), atol=ATOL, rtol=0)
