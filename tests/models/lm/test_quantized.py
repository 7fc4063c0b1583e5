"""Decoders with quantised weights: beside the same weights dequantised, op by op and recorded, on
one rank and on two."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.reference.quantized import quantize
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.quantization import SCHEMES
from sapwood.schema.config.model import GGUF_BLOCKS
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import Peer, make_peer, random_text

SCHEME_NAMES = ("w8a8_int8", "w4a8", *GGUF_BLOCKS)
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, biases": (
        "llama",
        "LlamaForCausalLM",
        {"head_dim": 32, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen3, tied": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 32, "tie_word_embeddings": True}),
}
FIELDS = {"hidden_size": 128, "intermediate_size": 192, "num_attention_heads": 4}
"""Whole blocks of 32 inputs, also on each of two ranks."""
ROUNDING = 0.04
"""What int8 activations may change of logits: the standard deviation of the error, in units of the
logits' own. Measured: 0.013 to 0.022."""
FINE_ROUNDING = 2e-4
"""The same of activations in 16 bits. Measured: 5e-5 to 8e-5."""

Checkpoint = dict[str, Any]

every_case = pytest.mark.parametrize("case", CASES)
every_scheme = pytest.mark.parametrize("scheme", SCHEME_NAMES)


@cache
def peer_of(case: str) -> Peer:
    model_type, architecture, fields = CASES[case]
    return make_peer(model_type, architecture, **(FIELDS | fields))


def is_linear(name: str, tensor: Tensor) -> bool:
    return tensor.ndim == 2 and "embed_tokens" not in name


def as_checkpoint(weights: Mapping[str, Tensor], scheme: str) -> Checkpoint:
    """What the loader would hand over: with gguf blocks of several kinds, some in one layer."""
    if scheme not in GGUF_BLOCKS:
        return dict(weights)
    kinds = {"k_proj": "q8_0", "embed_tokens": "q8_0", "lm_head": "q8_0"}
    found: Checkpoint = {}
    for name, tensor in weights.items():
        kind = next((kind for part, kind in kinds.items() if part in name), "q4_1")
        found[name] = quantize(tensor, kind) if tensor.ndim == 2 else tensor
    return found


def dequantized(weights: Mapping[str, Tensor], scheme: str, *, tied: bool) -> Checkpoint:
    """The weights that the scheme keeps, as fp32."""
    if scheme in GGUF_BLOCKS:
        return {
            name: one.dequantized(torch.float32) if isinstance(one, QuantizedWeight) else one
            for name, one in as_checkpoint(weights, scheme).items()
        }
    found: Checkpoint = {}
    kind = {"w8a8_int8": "int8", "w4a8": "q4_1"}[scheme]
    for name, tensor in weights.items():
        own = "q8_0" if "lm_head" in name else kind
        found[name] = (
            quantize(tensor, own).dequantized(torch.float32) if is_linear(name, tensor) else tensor
        )
    if tied:
        # The output layer has blocks of its own; the embedding is looked up as it is.
        table = weights["model.embed_tokens.weight"]
        found["lm_head.weight"] = quantize(table, "q8_0").dequantized(torch.float32)
    return found


def all_logits(session: Session) -> Tensor:
    """A prompt in two chunks, another request beside it, a mixture, decodes."""
    text, other = random_text(40), random_text(12, seed=3)
    steps = [
        {"a": text[:20]},
        {"a": text[20:39], "b": other[:9]},
        {"a": text[39:], "b": other[9:10]},
        {"b": other[10:]},
    ]
    return torch.cat([logits for step in steps for logits in session.step(step).values()])


def run(
    case: str,
    scheme: str,
    kernels: Kernels,
    *,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
    recorded: bool = False,
) -> Tensor:
    peer = peer_of(case)
    weights = as_checkpoint(peer.weights, scheme)
    how = SCHEMES.get(scheme)()
    model = make_decoder(peer.hf_config, weights, kernels, dtype=dtype, group=group, scheme=how)
    return all_logits(
        Session(model, dtype=dtype, group=group, recorded_by=kernels if recorded else None)
    )


def run_dequantized(case: str, scheme: str) -> Tensor:
    peer = peer_of(case)
    tied = peer.hf_config["tie_word_embeddings"]
    weights = dequantized(peer.weights, scheme, tied=tied)
    config = peer.hf_config
    if tied and scheme not in GGUF_BLOCKS:
        config = {**config, "tie_word_embeddings": False}
    return all_logits(Session(make_decoder(config, weights, ReferenceKernels())))


def spread_of_error(found: Tensor, expected: Tensor) -> float:
    return ((found - expected).std() / expected.std()).item()


@pytest.fixture
def native() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


@every_case
@every_scheme
def test_logits_are_those_of_the_dequantised_weights(case: str, scheme: str) -> None:
    """But for the rounding of activations to int8, or to 16 bits; without it they are equal."""
    exact = run_dequantized(case, scheme)
    torch.testing.assert_close(run(case, scheme, TorchKernels()), exact, atol=1e-4, rtol=0)
    error = spread_of_error(run(case, scheme, ReferenceKernels()), exact)
    least, most = (1e-6, FINE_ROUNDING) if scheme == "gguf" else (1e-4, ROUNDING)
    assert least < error <= most


@every_case
@every_scheme
@pytest.mark.parametrize("recorded", [False, True], ids=["op by op", "recorded"])
def test_native_logits_are_the_references(
    case: str, scheme: str, recorded: bool, native: CpuKernels
) -> None:
    """Single bits are tested in tests/kernels: here a number of x between two integers may be
    rounded either way after fp32 sums in another order. With w4a8 a few blocks in a thousand get
    other numbers, as good as the reference's."""
    found = run(case, scheme, native, recorded=recorded)
    limit = ROUNDING if scheme == "w4a8" else ROUNDING / 4
    assert spread_of_error(found, run(case, scheme, ReferenceKernels())) <= limit
    assert spread_of_error(found, run_dequantized(case, scheme)) <= ROUNDING


@every_case
@every_scheme
def test_a_recorded_step_equals_its_ops_bit_by_bit(
    case: str, scheme: str, native: CpuKernels
) -> None:
    """In bfloat16, where another order of operations would show."""
    dtype = torch.bfloat16
    eager = run(case, scheme, native, dtype=dtype)
    assert torch.equal(run(case, scheme, native, dtype=dtype, recorded=True), eager)


def test_quantised_logits_are_not_those_of_the_weights_as_they_were() -> None:
    """The comparisons above can fail: 4 bits change far more than rounding does."""
    case = "llama, biases"
    error = spread_of_error(
        run(case, "w4a8", ReferenceKernels()), run(case, "none", TorchKernels())
    )
    assert error > 3 * ROUNDING
    int8 = spread_of_error(
        run(case, "w8a8_int8", ReferenceKernels()), run(case, "none", TorchKernels())
    )
    assert int8 <= 1.5 * ROUNDING


def run_rank(rank: int, size: int, folder: Path) -> None:
    """One process of the group: leaves its logits in <rank>.pt."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size
    )
    assert dist.group.WORLD is not None
    group = Group.of(dist.group.WORLD)
    with torch.inference_mode():
        logits = {
            (case, scheme): run(case, scheme, ReferenceKernels(), group=group)
            for case in CASES
            for scheme in SCHEME_NAMES
        }
    torch.save(logits, folder / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_give_the_logits_of_one(tmp_path: Path) -> None:
    """Blocks stay whole, so that w4a8 and gguf differ by rounding alone; int8 rows are cut, and
    each half has a scale of its own."""
    mp.spawn(run_rank, args=(2, tmp_path), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for (case, scheme), logits in first.items():
        assert torch.equal(logits, second[case, scheme]), f"{case}: the ranks disagree"
        alone = run(case, scheme, ReferenceKernels())
        limit = ROUNDING if scheme == "w8a8_int8" else ROUNDING / 4
        assert spread_of_error(logits, alone) <= limit, (case, scheme)
