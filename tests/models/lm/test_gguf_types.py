"""A decoder whose layers hold every type of GGUF, several in a fused layer: op by op, recorded, and
beside the reference."""

from __future__ import annotations

from itertools import cycle

import pytest
import torch

from sapwood.kernels.blocks import FORMATS
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.registry import Need
from sapwood.layers.quantization.gguf import CheckpointScheme, gguf_a8_scheme, gguf_scheme
from tests.blocks import random_blocks
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import make_peer, random_text

CONFIG = {
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 2,
}
Weights = dict[str, "torch.Tensor | QuantizedWeight"]


def all_types(weights: dict[str, torch.Tensor]) -> Weights:
    """The types in turn over the matrices, each about as large as the weight in its place."""
    kinds = cycle(FORMATS)
    found: Weights = {}
    for name, weight in weights.items():
        if weight.ndim != 2:
            found[name] = weight
            continue
        kind = "q6_k" if "embed" in name else next(kinds)
        one = random_blocks(kind, *weight.shape)
        spread = one.dequantized(torch.float32).std().item()
        found[name] = random_blocks(kind, *weight.shape, scale=0.01 * 0.02 / spread)
    return found


def logits_of(
    hf_config: dict[str, object],
    weights: Weights,
    kernels: Kernels,
    scheme: CheckpointScheme,
    *,
    recorded: bool = False,
) -> torch.Tensor:
    model = make_decoder(hf_config, weights, kernels, scheme=scheme)
    session = Session(model, recorded_by=kernels if recorded else None)
    text = random_text(30)
    chunks = [session.step({"a": text[:20]}), session.step({"a": text[20:29]})]
    return torch.cat([logits["a"] for logits in (*chunks, session.step({"a": text[29:]}))])


@pytest.mark.parametrize("scheme", [gguf_scheme(), gguf_a8_scheme()], ids=lambda one: one.name)
def test_types_mixed_in_a_layer_are_computed_part_by_part_also_when_recorded(
    scheme: CheckpointScheme,
) -> None:
    need = Need(device="cpu", dtype=torch.float32, head_dim=64, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    torch.manual_seed(3)
    peer = make_peer("llama", "LlamaForCausalLM", **CONFIG)
    weights = all_types(peer.weights)
    used = {one.kind for one in weights.values() if isinstance(one, QuantizedWeight)}
    assert used == set(FORMATS)
    native = CpuKernels()
    recorded = logits_of(peer.hf_config, weights, native, scheme, recorded=True)
    assert torch.equal(recorded, logits_of(peer.hf_config, weights, native, scheme))
    expected = logits_of(peer.hf_config, weights, ReferenceKernels(), scheme)
    # A number of x between two integers may be rounded either way after sums in another order.
    assert (recorded - expected).std() <= 0.01 * expected.std()
