"""Ranks with requests of their own, which share the feed-forwards, give the logits of one rank."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed import deepep
from sapwood.distributed.groups import Group
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build, Groups
from sapwood.layers.deepep_exchange import DeepEPExchange
from sapwood.layers.expert_exchange import ExpertExchange, GroupExchange
from sapwood.layers.shared_rows import SharedRows
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder
from tests.distributed import standin_deepep
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.harness import CPU, Session, make_decoder
from tests.models.lm.peer import random_text
from tests.models.lm.rank_threads import on_ranks

OFTEN = {
    "smollm3",  # dense
    "qwen3_moe",
    "deepseek_v3",  # latent attention, experts and a shared one
    "qwen3_next",  # states beside attention, experts
    "longcat_flash",  # a feed-forward beside two layers
    "nemotron_h",  # layers without a feed-forward
}
"""Of the cases, those that `make test` tries."""
REFUSED = {
    "zamba2": "cannot share a block of several layers",
    "zamba2, one block": "cannot share a block of several layers",
}
"""Cases that cannot be shared, and the reason that users are told."""
TEXT = random_text(40)
Step = Mapping[str, Sequence[int]]
SCHEDULES: tuple[list[Step | None], ...] = (
    [{"a": TEXT[:20]}, {"a": TEXT[20:39], "b": TEXT[:9]}, None, {"a": TEXT[39:], "b": TEXT[9:10]}],
    [None, {"c": TEXT[7:11]}, {"c": TEXT[11:12]}, None],
)
"""What each rank computes in each step; None: it has nothing to do."""


def shared_decoder(
    hf_config: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    group: Group,
    *,
    splits_head: bool = True,
    spreads_experts: bool = False,
    sends_rows: bool = False,
    with_deepep: bool = False,
    num_redundant: int = 0,
) -> Decoder:
    config = read_decoder(hf_config)
    rows = SharedRows(group, group, width=config.hidden_size, dtype=torch.float32, device=CPU)
    groups = Groups(
        tp=group,
        attention=Group(),
        head=group if splits_head else None,
        expert=Group() if spreads_experts else None,
    )
    exchange: ExpertExchange | None = GroupExchange(group, group) if sends_rows else None
    if with_deepep:
        buffer = deepep.open_buffer(group, row_bytes=4 * config.hidden_size, library=standin_deepep)
        exchange = DeepEPExchange(buffer, group.size)
    build = Build(
        kernels=TorchKernels(),
        device=CPU,
        dtype=torch.float32,
        groups=groups,
        rows=rows,
        num_redundant_experts=num_redundant,
        exchange=exchange,
    )
    model = Decoder.of(config, build)
    load_weights(model, ((model.checkpoint_name(name), one) for name, one in weights.items()))
    model.finalize()
    return model


def run_alone(model: Decoder, steps: Sequence[Step | None]) -> Tensor:
    session = Session(model)
    found = [session.step(step).values() for step in steps if step is not None]
    return torch.cat([logits for step in found for logits in step])


def run_shared(model: Decoder, steps: Sequence[Step | None]) -> Tensor:
    session = Session(model)
    found: list[Tensor] = []
    for step in steps:
        if step is None:
            model.take_part()
            continue
        found += session.step(step).values()
        model.end_step()
    return torch.cat(found)


def check(
    hf_config: Mapping[str, Any], weights: Mapping[str, Tensor], *, size: int = 2, **how: Any
) -> None:
    schedules = (SCHEDULES * size)[:size]
    alone = make_decoder(hf_config, weights, TorchKernels())
    with torch.inference_mode():
        expected = [run_alone(alone, steps) for steps in schedules]

    def run(group: Group) -> Tensor:
        model = shared_decoder(hf_config, weights, group, **how)
        return run_shared(model, schedules[group.rank])

    for found, wanted in zip(on_ranks(size, run), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "case",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_every_architecture(case: str) -> None:
    peer = peer_of(case)
    if (reason := REFUSED.get(case)) is None:
        check(peer.hf_config, peer.weights)
        return
    with pytest.raises(ConfigError, match=reason):
        check(peer.hf_config, peer.weights)


@pytest.mark.parametrize(
    "how", [{"splits_head": False}, {"spreads_experts": True}, {"size": 3, "spreads_experts": True}]
)
def test_whole_heads_and_whole_experts(how: dict[str, Any]) -> None:
    peer = peer_of("qwen3_moe")
    check(peer.hf_config, peer.weights, **how)


SENT = {"spreads_experts": True, "sends_rows": True}


@pytest.mark.parametrize(
    ("case", "how"),
    [
        ("qwen3_moe", SENT),
        ("deepseek_v3", SENT),  # a shared expert, which each rank has whole, and dense layers
        ("llama4", SENT | {"num_redundant": 1}),  # weights of inputs, an expert on both ranks
        ("longcat_flash", SENT),  # experts that give what they take
        ("nemotron_h, experts", SENT),
        ("qwen3_moe", SENT | {"size": 4, "num_redundant": 2}),
        ("deepseek_v3", {"spreads_experts": True, "with_deepep": True}),
        ("llama4", {"spreads_experts": True, "with_deepep": True, "num_redundant": 1}),
    ],
)
def test_tokens_that_are_sent_to_their_experts(case: str, how: dict[str, Any]) -> None:
    peer = peer_of(case)
    check(peer.hf_config, peer.weights, **how)


class Nothing:
    """A rank's part that adds nothing."""

    sends_rows = False

    def __init__(self, group: Group) -> None:
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        return self._group.all_reduce(torch.zeros_like(x))


def test_the_ranks_depend_on_each_other() -> None:
    """The comparison can fail: without the rows of the others, a part of the sum is missing."""
    peer = peer_of("smollm3")
    alone = make_decoder(peer.hf_config, peer.weights, TorchKernels())
    with torch.inference_mode():
        expected = run_alone(alone, SCHEDULES[0])

    def run(group: Group) -> Tensor:
        model = shared_decoder(peer.hf_config, peer.weights, group)
        if group.rank == 1:
            model._shared[0]._own = Nothing(group)  # type: ignore[assignment]
        return run_shared(model, SCHEDULES[group.rank])

    with pytest.raises(AssertionError):
        torch.testing.assert_close(on_ranks(2, run)[0], expected, atol=1e-4, rtol=0)


def test_rows_that_are_not_those_agreed_upon_are_an_error() -> None:
    rows = SharedRows(Group(), Group(), width=4, dtype=torch.float32, device=CPU)
    assert rows.begin(2)
    assert rows.own(rows.gathered(torch.ones(2, 4))).shape == (2, 4)
    for x in (torch.ones(3, 4), torch.ones(2, 5), torch.ones(2, 4, dtype=torch.bfloat16)):
        with pytest.raises(ValueError, match="a rank brings"):
            rows.gathered(x)
    assert not rows.begin(0)
