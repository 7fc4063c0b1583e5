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
from sapwood.layers.build import Build, Groups
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import read_decoder
from tests.models.lm.harness import NewTokens, make_batch, make_decoder, make_kv_caches
from tests.tiny import llama_config


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
