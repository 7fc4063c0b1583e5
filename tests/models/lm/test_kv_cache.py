"""Decoders over a KV cache in 8 bits beside the same ones over a dense one."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.torch_ops import TorchKernels
from tests.models.lm.cases import peer_of
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text

ERROR = {torch.int8: 0.015, torch.float8_e4m3fn: 0.055, torch.float8_e5m2: 0.11}
"""Of the logits' spread, root mean square: what rounding keys and values costs a random model."""

IMPLEMENTATIONS: dict[str, Kernels] = {"reference": ReferenceKernels(), "torch": TorchKernels()}
if CpuKernels.usable_isas():
    IMPLEMENTATIONS["cpu"] = CpuKernels()


@cache
def peer() -> Peer:
    return make_peer("qwen3", "Qwen3ForCausalLM", head_dim=128)


def run(kernels: Kernels, kv_dtype: torch.dtype) -> Tensor:
    """Logits of a prompt at once, of another in chunks, of one on a prefix hit, and of decodes."""
    session = Session(make_decoder(peer().hf_config, peer().weights, kernels), dtype=kv_dtype)
    text = random_text(41)
    found = [session.step({"a": text})["a"], session.in_chunks("b", text, 7)]
    session.share("a", "c", 16)
    found += session.step({"c": text[16:], "d": random_text(9, seed=1)}).values()
    for token in (5, 6):
        found += session.step({"a": [token], "b": [token], "d": [token]}).values()
    return torch.cat(found)


def spread_of_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual - expected).square().mean().sqrt() / expected.std()).item()


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
@pytest.mark.parametrize("kv_dtype", ERROR, ids=["int8", "e4m3", "e5m2"])
def test_logits_stay_close_to_those_of_a_dense_cache(name: str, kv_dtype: torch.dtype) -> None:
    kernels = IMPLEMENTATIONS[name]
    error = spread_of_error(run(kernels, kv_dtype), run(kernels, torch.float32))
    assert ERROR[kv_dtype] / 20 < error <= ERROR[kv_dtype]
    # What is left between implementations are numbers that were rounded to the other neighbour.
    other = spread_of_error(run(kernels, kv_dtype), run(ReferenceKernels(), kv_dtype))
    assert other <= ERROR[kv_dtype] / 5


@pytest.mark.skipif("cpu" not in IMPLEMENTATIONS, reason="no native kernels")
@pytest.mark.parametrize("case", ["qwen3", "glm_moe_dsa", "deepseek_v32, few keys"])
@pytest.mark.parametrize("kv_dtype", ERROR, ids=["int8", "e4m3", "e5m2"])
def test_a_recorded_step_equals_its_ops_bit_by_bit(case: str, kv_dtype: torch.dtype) -> None:
    """The last step's texts are so short that no key is left out."""
    kernels, of = CpuKernels(), peer() if case == "qwen3" else peer_of(case)
    weights = {name: weight.bfloat16() for name, weight in of.weights.items()}
    model = make_decoder(of.hf_config, weights, kernels, dtype=torch.bfloat16)
    by_ops = Session(model, dtype=kv_dtype)
    recorded = Session(model, dtype=kv_dtype, recorded_by=kernels)
    for step in (
        {"a": random_text(40)},
        {"a": [5], "b": random_text(19, seed=1), "c": random_text(3, seed=2)},
        {"a": [6], "b": [7], "c": [8]},
        {"d": [9, 10, 11]},
    ):
        expected, got = by_ops.step(step), recorded.step(step)
        for name in step:
            assert torch.equal(expected[name], got[name]), name
