from __future__ import annotations

import dataclasses

import pytest
import torch

from sapwood.distributed.groups import Group
from sapwood.executor.graphs import NoGraph, choose_graph
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.recording import DecoderParts
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import ARCHITECTURES
from tests.models.lm.harness import NewTokens, make_batch, make_decoder, make_kv_caches
from tests.tiny import llama_config


@dataclasses.dataclass
class Description:
    """A model that is nothing but what it says of itself."""

    content: DecoderParts

    def parts(self) -> DecoderParts:
        return self.content


def make_model(kernels: Kernels, dtype: torch.dtype = torch.float32, **fields: object) -> Decoder:
    config = llama_config(**fields)
    decoder = DecoderConfig.from_hf(config)
    blank = ARCHITECTURES.get(decoder.architecture)(
        decoder, kernels, Group(), torch.device("cpu"), dtype
    )
    weights = dict(random_weights(blank.targets(), seed=1, dtype=dtype))
    return make_decoder(config, weights, kernels, dtype=dtype)


@pytest.fixture
def native() -> CpuKernels:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    reason = CpuKernels.why_not(need)
    if reason is not None:
        pytest.skip(f"the C++ kernels cannot run here: {reason}")
    return CpuKernels()


def test_only_wanted_rows_have_logits_and_a_chunk_has_none(native: CpuKernels) -> None:
    model = make_model(native)
    caches = make_kv_caches(model.config, num_pages=8, page_size=8)
    graph = choose_graph(model, native, caches, enabled=True).graph
    batch = make_batch([NewTokens([1, 2, 3], 0, [1]), NewTokens([4, 5], 0, [2])], caches)
    every = graph.replay(batch)
    assert every is not None
    every = every.clone()
    some = graph.replay(dataclasses.replace(batch, logits_index=torch.tensor([4, 2])))
    assert some is not None
    assert torch.equal(some, every[[4, 2]])
    nothing = graph.replay(
        dataclasses.replace(batch, logits_index=torch.tensor([], dtype=torch.int64))
    )
    assert nothing is not None
    assert nothing.shape == (0, model.config.vocab_size)
    with pytest.raises(ValueError, match="logits of 6 rows are wanted but there are 5 tokens"):
        graph.replay(dataclasses.replace(batch, logits_index=torch.zeros(6, dtype=torch.int64)))


def test_disabled() -> None:
    kernels = TorchKernels()
    choice = choose_graph(make_model(kernels), kernels, [], enabled=False)
    assert isinstance(choice.graph, NoGraph)
    assert choice.why == "disabled by --disable-graphs"
    assert not choice.is_recorded


def test_kernels_without_one_say_why() -> None:
    kernels = TorchKernels()
    choice = choose_graph(make_model(kernels), kernels, [], enabled=True)
    assert not choice.is_recorded
    assert choice.why == "the torch kernels cannot record it: torch's ops are called one by one"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"num_ranks": 2}, "2 ranks add their results up between its ops"),
        (
            {"lm_head": torch.relu},
            "lm_head is a builtin_function_or_method, which has no native form",
        ),
    ],
)
def test_what_the_native_kernels_cannot_record(
    change: dict[str, object], why: str, native: CpuKernels
) -> None:
    model = make_model(native)
    caches = make_kv_caches(model.config, num_pages=4, page_size=8)
    parts = dataclasses.replace(model.parts(), **change)
    choice = choose_graph(Description(parts), native, caches, enabled=True)
    assert not choice.is_recorded
    assert why in choice.why


def test_an_odd_width_in_bfloat16_is_computed_eagerly(native: CpuKernels) -> None:
    model = make_model(native, torch.bfloat16, intermediate_size=95)
    caches = make_kv_caches(model.config, num_pages=4, page_size=8, dtype=torch.bfloat16)
    choice = choose_graph(model, native, caches, enabled=True)
    assert not choice.is_recorded
    assert "down has 95 inputs; a bf16 step needs an even number" in choice.why
