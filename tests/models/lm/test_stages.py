"""Stages, each with its layers of a model, give together the logits of the whole model."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.distributed.groups import Group
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.quantization.gguf import gguf_scheme
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.registry import read_decoder
from sapwood.models.splitting import refuse_split
from sapwood.schema.stage import Stage, stages_of, whole_model
from tests.models.lm.cases import CASES, peer_of
from tests.models.lm.harness import Session, make_decoder
from tests.models.lm.peer import make_peer, random_text
from tests.models.lm.rank_threads import on_ranks
from tests.models.lm.test_checkpoints import load, write
from tests.models.lm.test_checkpoints import peer_of as quantised_peer
from tests.models.lm.test_gguf_types import CONFIG, all_types
from tests.quantized_checkpoints import CASES as FORMATS

OFTEN = {
    "mixtral, window",  # pools of windows
    "lfm2",
    "falcon_h1",  # states beside keys and values in each layer
    "kimi_linear",  # states and latent rows
    "longcat_flash",  # two attentions per layer
    "opt, projections",  # something before the first layer and after the last one
}
"""Of the cases, those that `make test` tries."""


class Queue:
    """A pipe between two stages that run one after the other in one thread."""

    def __init__(self) -> None:
        self._before: deque[Tensor] = deque()
        self.after: deque[Tensor] = deque()

    def follow(self, other: Queue) -> Queue:
        self._before = other.after
        return self

    def receive(self, num_rows: int) -> Tensor:
        x = self._before.popleft()
        assert len(x) == num_rows
        return x

    def send(self, x: Tensor) -> None:
        self.after.append(x.clone())


class Pipeline:
    """All stages, as one model."""

    def __init__(self, stages: list[Decoder]) -> None:
        self._stages = stages
        self.config = stages[-1].config

    def compute(self, batch: ForwardBatch) -> Tensor:
        *others, last = self._stages
        for stage in others:
            stage.forward(batch)
        return last.compute(batch)


def pipeline(
    hf_config: Mapping[str, Any], weights: Mapping[str, Any], stages: tuple[Stage, ...], **how: Any
) -> Any:
    def make(stage: Stage, pipe: Queue) -> Decoder:
        return make_decoder(hf_config, weights, TorchKernels(), stage=stage, pipe=pipe, **how)

    return piped(stages, make)


def piped(stages: tuple[Stage, ...], make: Callable[[Stage, Queue], Decoder]) -> Any:
    pipes = [Queue() for _ in stages]
    for before, after in pairwise(pipes):
        after.follow(before)
    return Pipeline([make(stage, pipe) for stage, pipe in zip(stages, pipes, strict=True)])


def run(model: Any, group: Group | None = None) -> Tensor:
    """A prompt in two chunks beside another request, then a decode of both."""
    session, text = Session(model, group=group), random_text(40)
    steps = [
        {"a": text[:20]},
        {"a": text[20:39], "b": text[:9]},
        {"a": text[39:], "b": text[9:10]},
    ]
    with torch.inference_mode():
        return torch.cat([logits for step in steps for logits in session.step(step).values()])


def check(
    hf_config: Mapping[str, Any], weights: Mapping[str, Any], *counts: int, **how: Any
) -> None:
    expected = run(make_decoder(hf_config, weights, TorchKernels(), **how))
    for count in counts:
        stages = stages_of(read_decoder(hf_config).num_layers, count)
        torch.testing.assert_close(
            run(pipeline(hf_config, weights, stages, **how)), expected, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("tied", [True, False])
def test_two_three_and_uneven_stages(tied: bool) -> None:
    peer = make_peer(
        "llama", "LlamaForCausalLM", num_hidden_layers=4, tie_word_embeddings=tied, head_dim=32
    )
    check(peer.hf_config, peer.weights, 2, 3, 4)
    uneven = pipeline(peer.hf_config, peer.weights, stages_of(4, 2, [1, 3]))
    whole = run(make_decoder(peer.hf_config, peer.weights, TorchKernels()))
    torch.testing.assert_close(run(uneven), whole, atol=1e-4, rtol=0)
    first, last = (set(stage.targets()) for stage in uneven._stages)
    shared = {"model.embed_tokens.weight"} if tied else set()
    assert first & last == shared, "each weight is in one stage, but the one that both need"
    assert "model.norm.weight" in last - first
    # The comparison can fail: without a layer the logits are others.
    uneven._stages[1]._layers = uneven._stages[1]._layers[:-1]
    uneven._stages[1]._stage = Stage(index=1, count=2, layers=range(1, 3))
    with pytest.raises(AssertionError):
        torch.testing.assert_close(run(uneven), whole, atol=1e-4, rtol=0)


def test_stages_of_a_gguf_files_types() -> None:
    peer = make_peer("llama", "LlamaForCausalLM", **CONFIG)
    check(peer.hf_config, all_types(peer.weights), 2, scheme=gguf_scheme())


def test_stages_of_a_file_with_act_order(tmp_path: Path) -> None:
    form = FORMATS["gptq 4, act-order, zero points"]
    files, _ = write(tmp_path, quantised_peer("llama", False), form.config, lambda _: form.make)

    def make(stage: Stage, pipe: Queue) -> Decoder:
        model: Decoder = load(files, TorchKernels(), stage=stage, pipe=pipe)
        return model

    expected = run(load(files, TorchKernels()))
    torch.testing.assert_close(run(piped(stages_of(2, 2), make)), expected, atol=1e-4, rtol=0)


def test_stages_of_ranks_with_different_experts() -> None:
    peer = peer_of("qwen3_moe")
    expected = run(make_decoder(peer.hf_config, peer.weights, TorchKernels()))
    stages = stages_of(read_decoder(peer.hf_config).num_layers, 2)

    def run_rank(group: Group) -> Tensor:
        how = {"group": group, "spreads_experts": True}
        return run(pipeline(peer.hf_config, peer.weights, stages, **how), group)

    for found in on_ranks(2, run_rank):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def splits(config: DecoderConfig, stages: tuple[Stage, ...]) -> bool:
    try:
        for stage in stages:
            refuse_split(config, stage)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize(
    "case",
    [name if name in OFTEN else pytest.param(name, marks=pytest.mark.long) for name in CASES],
)
def test_every_architecture(case: str) -> None:
    peer = peer_of(case)
    config = read_decoder(peer.hf_config)
    most = config.num_layers
    counts = [count for count in {2, 3, most} if 1 < count <= most]
    counts = [count for count in counts if splits(config, stages_of(most, count))]
    if not counts:
        pytest.skip("its layers cannot be apart, which the tests below are about")
    check(peer.hf_config, peer.weights, *counts)


def test_caches_are_those_of_the_stages_layers() -> None:
    for case in ("falcon_h1", "longcat_flash", "lfm2"):
        config = read_decoder(peer_of(case).hf_config)
        stages = stages_of(config.num_layers, 2)
        held = [config.caches_of(stage.layers) for stage in stages]
        every = {number for group in config.cache_groups for number in group.layers}
        assert held[0] | held[1] == every
        assert not held[0] & held[1]
        assert all(held)


def test_layers_that_need_each_other_are_not_parted() -> None:
    zamba = read_decoder(peer_of("zamba2").hf_config)
    with pytest.raises(ConfigError, match=r"weights in common.*--tp-size"):
        refuse_split(zamba, stages_of(zamba.num_layers, 2)[0])
    gemma = read_decoder(peer_of("gemma3n").hf_config)
    sharing = next(
        layer
        for layer in range(gemma.num_layers)
        if (heads := gemma.heads_of(layer)) is not None and heads.source is not None
    )
    for stage in stages_of(gemma.num_layers, 2, [sharing, gemma.num_layers - sharing]):
        with pytest.raises(ConfigError, match=r"keys and values of layer.*--pp-layer-partition"):
            refuse_split(gemma, stage)


def test_a_stage_without_neighbours_is_refused() -> None:
    peer = make_peer("llama", "LlamaForCausalLM")
    half = replace(whole_model(2), count=2, layers=range(1))
    with pytest.raises(AssertionError):
        make_decoder(peer.hf_config, peer.weights, TorchKernels(), stage=half)
