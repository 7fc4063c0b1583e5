from __future__ import annotations

import dataclasses
from unittest.mock import Mock

import pytest
import torch
import torch.distributed as dist

from sapwood.distributed.groups import Group
from sapwood.executor.recorded import NothingRecorded, record_steps
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.interface import Kernels
from sapwood.kernels.recording import CannotRecord, Program
from sapwood.kernels.registry import Need
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.adapters import AdapterContext, StepAdapters
from sapwood.layers.build import Build, Groups
from sapwood.lora.adapter import adaptable
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import read_decoder
from tests.adapters import random_adapter
from tests.kernels.test_low_rank import rows_of
from tests.models.lm.harness import NewTokens, make_batch, make_decoder, make_kv_caches
from tests.tiny import llama_config

MIXTURE = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 258,
    "hidden_size": 256,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_experts": 6,
    "num_experts_per_tok": 6,
    "norm_topk_prob": True,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10_000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
}


def make_model(kernels: Kernels, dtype: torch.dtype = torch.float32, **fields: object) -> Decoder:
    config = llama_config(**fields)
    build = Build(kernels=kernels, device=torch.device("cpu"), dtype=dtype)
    blank = Decoder.of(read_decoder(config), build)
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
    recorded = record_steps(model, native, caches, enabled=True).steps
    batch = make_batch([NewTokens([1, 2, 3], 0, [1]), NewTokens([4, 5], 0, [2])], caches)
    every = recorded.replay(batch)
    assert every is not None
    every = every.clone()
    some = recorded.replay(dataclasses.replace(batch, logits_index=torch.tensor([4, 2])))
    assert some is not None
    assert torch.equal(some, every[[4, 2]])
    nothing = recorded.replay(
        dataclasses.replace(batch, logits_index=torch.tensor([], dtype=torch.int64))
    )
    assert nothing is not None
    assert nothing.shape == (0, model.config.vocab_size)
    with pytest.raises(ValueError, match="logits of 6 rows are wanted but there are 5 tokens"):
        recorded.replay(dataclasses.replace(batch, logits_index=torch.zeros(6, dtype=torch.int64)))


@pytest.mark.parametrize("layers", [(), (0, 1, 2)], ids=["after the last norm", "entering layers"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_states_are_those_of_the_single_ops(
    native: CpuKernels, layers: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Of all tokens, also of those whose logits nobody wants."""
    model = make_model(native, dtype, num_hidden_layers=3)
    caches = make_kv_caches(model.config, num_pages=8, page_size=8, dtype=dtype)
    recorded = record_steps(model, native, caches, enabled=True, states=layers).steps
    batch = make_batch([NewTokens([1, 2, 3], 0, [1]), NewTokens([4, 5], 0, [2])], caches)
    batch = dataclasses.replace(batch, logits_index=torch.tensor([4]))
    hidden, captured = model.forward_capturing(batch, layers)
    expected = torch.cat(captured, dim=-1) if layers else hidden
    states = torch.full_like(expected, torch.nan)
    logits = recorded.replay(batch, states)
    assert logits is not None
    assert torch.equal(states, expected)
    assert torch.equal(logits, model.logits(hidden[4:]))
    again = recorded.replay(batch)
    assert again is not None, "nobody wants the states"
    with pytest.raises(ValueError, match="states are"):
        recorded.replay(batch, states[:, 1:])


@torch.inference_mode()
@pytest.mark.parametrize("num_tokens", [5, 200], ids=["few", "many"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_of_experts_and_embeddings_are_those_of_the_single_ops(
    native: CpuKernels, dtype: torch.dtype, num_tokens: int
) -> None:
    """All experts are chosen, so that rounding cannot choose others."""
    context = AdapterContext()
    build = Build(kernels=native, device=torch.device("cpu"), dtype=dtype, adapters=context)
    model = Decoder.of(read_decoder(MIXTURE), build)
    load_weights(model, random_weights(model.targets(), seed=1, dtype=dtype, std=0.1))
    model.finalize()
    places = adaptable(model.adapter_targets(), model.checkpoint_name, dtype)
    for slot, ending in enumerate(["", "down_proj"]):
        adapter = random_adapter(places.targets, 3 + slot, ending=ending, seed=slot, dtype=dtype)
        for site, addition in adapter.items():
            site.place(slot, addition)
    embedding = places.vocab["model.embed_tokens"]
    assert embedding.low_rank is not None
    a, b = torch.randn(2, MIXTURE["vocab_size"]), torch.randn(MIXTURE["hidden_size"], 2) * 0.1
    embedding.site.place(2, embedding.low_rank(a, b))
    assert all(target.site.is_recorded for target in places.targets.values())
    caches = make_kv_caches(model.config, num_pages=8, page_size=64, dtype=dtype)
    recorded = record_steps(model, native, caches, enabled=True).steps
    batch = make_batch([NewTokens([i % 250 for i in range(num_tokens)], 0, range(8))], caches)
    batch = dataclasses.replace(batch, logits_index=torch.arange(num_tokens - 5, num_tokens))
    plain = model.compute(batch)
    slots = [(0, -1, 1, 2, 0)[i % 5] for i in range(num_tokens)]
    adapters = StepAdapters(rows=rows_of(slots), selected=rows_of(slots[-5:]))
    with context.of(adapters):
        expected = model.compute(batch)
        found = recorded.replay(dataclasses.replace(batch, adapters=adapters))
    assert found is not None
    scale = expected.abs().max()
    assert (found - expected).abs().max() < scale * (1e-5 if dtype is torch.float32 else 3e-2)
    assert (plain - expected).abs().max() > scale * 0.1
    again = recorded.replay(batch)
    assert again is not None
    assert (again - plain).abs().max() < scale * (1e-5 if dtype is torch.float32 else 3e-2)


def test_disabled() -> None:
    kernels = TorchKernels()
    choice = record_steps(make_model(kernels), kernels, [], enabled=False)
    assert isinstance(choice.steps, NothingRecorded)
    assert choice.why == "disabled by --disable-graphs"
    assert not choice.is_recorded


def test_kernels_without_one_say_why() -> None:
    kernels = TorchKernels()
    choice = record_steps(make_model(kernels), kernels, [], enabled=True)
    assert not choice.is_recorded
    assert choice.why == "the torch kernels cannot record it: torch's ops are called one by one"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layer": torch.relu}, "a builtin_function_or_method has no native form"),
        ({"soft_cap": 30.0}, None),
    ],
)
def test_what_the_native_kernels_can_and_cannot_record(
    change: dict[str, object], why: str | None, native: CpuKernels
) -> None:
    """The output layer is changed."""
    model = make_model(native)
    caches = make_kv_caches(model.config, num_pages=4, page_size=8)
    program = Program(torch.float32)
    before, after = model.program().split()
    for op in (*before, *after[:-1], dataclasses.replace(after[-1], **change)):
        program.add(op)
    choice = record_steps(Mock(program=lambda states: program), native, caches, enabled=True)
    assert choice.is_recorded == (why is None)
    assert (why or "a step is one call") in choice.why


def test_a_model_on_two_ranks_is_no_program() -> None:
    groups = Groups.tensor_parallel(Group(size=2, process_group=Mock(spec=dist.ProcessGroup)))
    build = Build(
        kernels=TorchKernels(), device=torch.device("cpu"), dtype=torch.float32, groups=groups
    )
    model = Decoder.of(read_decoder(llama_config(num_key_value_heads=2)), build)
    with pytest.raises(CannotRecord, match="2 ranks add their results up between its ops"):
        model.program()


def test_an_odd_width_in_bfloat16_is_computed_eagerly(native: CpuKernels) -> None:
    model = make_model(native, torch.bfloat16, intermediate_size=95)
    caches = make_kv_caches(model.config, num_pages=4, page_size=8, dtype=torch.bfloat16)
    choice = record_steps(model, native, caches, enabled=True)
    assert not choice.is_recorded
    assert "has 95 inputs; a bf16 step needs an even number" in choice.why
