"""Captured steps give what the op-by-op model gives, whatever steps came before."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sapwood.executor.cache_inputs import SparePlaces
from sapwood.executor.captured import SHARING_FROM, CapturedSteps, capture_steps
from sapwood.executor.captured_memory import CapturePlan
from sapwood.kernels.accelerators import capture_on
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.capture import capture
from sapwood.kernels.recording import CannotRecord
from sapwood.kernels.reference import ReferenceKernels
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.build import Build
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import read_decoder
from tests.executor.device_style import DeviceStyle
from tests.executor.recording_capture import HostLooked, RecordingCapture
from tests.models.lm.harness import NewTokens, make_batch, make_decoder, make_kv_caches
from tests.tiers import examples
from tests.tiny import llama_config

PAGE, MAX_PAGES, NUM_PAGES = 4, 6, 40
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@cache
def make_model() -> Decoder:
    config = llama_config()
    blank = make_model_blank(DeviceStyle())
    weights = dict(random_weights(blank.targets(), seed=1, dtype=torch.float32, std=0.2))
    return make_decoder(config, weights, DeviceStyle())


def make_plan(decode: tuple[int, ...], prefill: tuple[int, ...]) -> CapturePlan:
    return CapturePlan(
        decode=decode,
        prefill=prefill,
        max_pages=MAX_PAGES,
        page_size=PAGE,
        spares=SparePlaces(pages=(NUM_PAGES - 1,)),
        vocab_size=make_model().config.vocab_size,
        dtype=torch.float32,
        device=CPU,
    )


Caches = list[tuple[Tensor, Tensor]]


def make_caches() -> Caches:
    return make_kv_caches(make_model().config, num_pages=NUM_PAGES, page_size=PAGE)


@cache
def captured(
    decode: tuple[int, ...], prefill: tuple[int, ...]
) -> tuple[CapturedSteps, Caches, RecordingCapture]:
    caches, recorder = make_caches(), RecordingCapture()
    plan = make_plan(decode, prefill)
    return capture_steps(make_model(), DeviceStyle(), caches, plan, recorder), caches, recorder


@torch.inference_mode()
def check_steps(
    plan: tuple[tuple[int, ...], tuple[int, ...]], steps: Sequence[Sequence[int]]
) -> list[bool]:
    """Each step: new tokens of requests 0, 1, … in turn, 0 for none. Which steps were replayed."""
    graph, replayed_caches, _ = captured(*plan)
    eager_caches = make_caches()
    for pair in replayed_caches:
        for one in pair:
            one.fill_(torch.nan)
    model, covered = make_model(), []
    computed = [0] * max(map(len, steps))
    for number, news in enumerate(steps):
        requests = []
        for index, num_new in enumerate(news):
            num_new = min(num_new, MAX_PAGES * PAGE - computed[index])
            if num_new > 0:
                ids = [(7 * number + 11 * index + 5 * i) % 250 for i in range(num_new)]
                pages = tuple(range(index * MAX_PAGES, (index + 1) * MAX_PAGES))
                requests.append(NewTokens(ids, computed[index], pages))
                computed[index] += num_new
        if not requests:
            continue
        requests.sort(key=lambda one: len(one.token_ids) != 1)
        batch = make_batch(requests, replayed_caches)
        # As in a step: only the last token of each request has its logits computed.
        batch = replace(batch, logits_index=batch.attention.query_start[1:].long() - 1)
        eager = replace(batch, kv_caches=eager_caches)
        eager = replace(eager, attention=replace(eager.attention, cache={}))
        expected = model.compute(eager)
        got = graph.replay(batch)
        covered.append(got is not None)
        if got is None:
            got = model.compute(batch)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    for replayed, eager_pair in zip(replayed_caches, eager_caches, strict=True):
        for mine, its in zip(replayed, eager_pair, strict=True):
            torch.testing.assert_close(mine[:-1], its[:-1], rtol=1e-4, atol=1e-4, equal_nan=True)
    return covered


PLANS = [((1, 2, 4), (8, 16)), ((3,), ()), ((), (6,)), ((1, 2, 3, 4, 5, 6), (1, 2, 3, 40))]
NEWS = st.lists(st.sampled_from([0, 1, 1, 1, 2, 5, 9]), min_size=6, max_size=6)


@settings(max_examples=examples(100))
@given(st.sampled_from(PLANS), st.lists(NEWS, min_size=1, max_size=8))
def test_replays_give_what_the_ops_give(
    plan: tuple[tuple[int, ...], tuple[int, ...]], steps: list[list[int]]
) -> None:
    covered = check_steps(plan, steps)
    decode, prefill = plan
    computed = [0] * 6
    expected = []
    for news in steps:
        left = [min(new, MAX_PAGES * PAGE - one) for new, one in zip(news, computed, strict=True)]
        computed = [one + new for one, new in zip(computed, left, strict=True)]
        total = sum(left)
        if total == 0:
            continue
        is_decode = max(left) == 1 and total <= max(decode, default=0)
        expected.append(is_decode or total <= max(prefill, default=0))
    assert covered == expected


def test_a_smaller_step_after_a_larger_one_reads_nothing_of_it() -> None:
    assert all(check_steps(PLANS[0], [[9, 5, 1, 0], [1, 1, 1, 1], [1, 1], [0, 0, 1], [2], [1, 1]]))


def test_tokens_of_nobody_go_to_the_page_that_no_request_has() -> None:
    check_steps(((4,), (16,)), [[3], [1], [1]])
    _, caches, _ = captured((4,), (16,))
    for pair in caches:
        for one in pair:
            assert one[-1, :, 0].isfinite().all(), "the spare page took them"
            assert one[2:-1].isnan().all(), "and no other page but the request's"


def test_the_largest_is_captured_first_and_progress_is_told() -> None:
    told: list[tuple[int, int]] = []
    graph = capture_steps(
        make_model(),
        DeviceStyle(),
        make_caches(),
        make_plan((1, 2), (8, 16)),
        RecordingCapture(),
        on_progress=lambda done, total: told.append((done, total)),
    )
    assert (list(graph.plain.prefills), list(graph.plain.decodes)) == ([16, 8], [2, 1])
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


class Sharing:
    """Plans where the first two requests have one first page; counts the layers that follow it."""

    def __init__(self) -> None:
        self.num_layers = torch.zeros(1)

    def install(self, batch: AttentionBatch) -> None:
        batch.cache["sharing"] = self

    def plan(self, batch: AttentionBatch) -> bool:
        table = batch.host_page_table
        return table is not None and len(table) > 1 and table[0, 0] == table[1, 0]


class SharingStyle(DeviceStyle):
    def __init__(self) -> None:
        super().__init__()
        self.sharings: dict[int, Sharing] = {}

    def captured_sharing(self, num_requests: int, page_size: int, device: torch.device) -> Any:
        self.sharings[num_requests] = Sharing()
        return self.sharings[num_requests]

    def paged_attention(
        self, q: Tensor, key_cache: Tensor, value_cache: Tensor, batch: AttentionBatch, *more: Any
    ) -> Tensor:
        if "sharing" in batch.cache:
            batch.cache["sharing"].num_layers.add_(1)
        return super().paged_attention(q, key_cache, value_cache, batch, *more)


@torch.inference_mode()
def test_steps_that_share_pages_replay_what_was_captured_for_them() -> None:
    kernels, caches = SharingStyle(), make_caches()
    weights = dict(random_weights(make_model_blank(kernels).targets(), seed=1, dtype=torch.float32))
    model = make_decoder(llama_config(), weights, kernels)
    graph = capture_steps(
        model, kernels, caches, make_plan((4, SHARING_FROM), ()), RecordingCapture()
    )
    assert list(kernels.sharings) == [SHARING_FROM], "fewer requests save too little"
    sharing = kernels.sharings[SHARING_FROM]
    sharing.num_layers.zero_()
    for num, first_pages, shares in ((6, (3, 3), True), (6, (3, 9), False), (3, (3, 3), False)):
        pages = [*first_pages, 10, 11, 12, 13][:num]
        batch = make_batch([NewTokens([7 + one], 0, (one,)) for one in pages], caches)
        table = batch.attention.page_table.numpy()
        attention = replace(batch.attention, host_page_table=table)
        batch = replace(batch, attention=attention, logits_index=torch.arange(num))
        got = graph.replay(batch)
        assert sharing.num_layers.item() == (model.config.num_layers if shares else 0)
        sharing.num_layers.zero_()
        expected = model.compute(replace(batch, attention=replace(attention, cache={})))
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def some_settings(num: int, seed: int) -> SamplingSettings:
    choose = random.Random(seed)
    return SamplingSettings(
        temperature=[choose.choice([0.5, 1.0, 3.0]) for _ in range(num)],
        top_k=[choose.choice([-1, 1, 5, 40]) for _ in range(num)],
        top_p=[choose.choice([1.0, 0.3, 0.9]) for _ in range(num)],
        min_p=[choose.choice([0.0, 0.0, 0.2]) for _ in range(num)],
        numbers=[choose.random() for _ in range(num)],
    )


@torch.inference_mode()
def test_tokens_are_chosen_by_a_replay_too() -> None:
    """From a step's logits, also where these were changed after it."""
    graph, caches, recorder = captured(*PLANS[0])
    reference = ReferenceKernels()
    for seed, num in enumerate((4, 1, 3, 2)):
        requests = [NewTokens([index], 0, (index,)) for index in range(num)]
        batch = make_batch(requests, caches)
        batch = replace(batch, logits_index=torch.arange(num))
        logits = graph.replay(batch)
        assert logits is not None
        logits[:, seed] += 5.0
        replays = sum(one.num_replays for one in recorder.recordings)
        first = graph.sampling_ops.argmax(logits)
        assert torch.equal(first, logits.argmax(-1))
        settings = some_settings(num, seed)
        second = graph.sampling_ops.sample(logits, settings)
        assert torch.equal(second, reference.sample(logits.clone(), settings))
        assert torch.equal(first, logits.argmax(-1)), "what was chosen before stays"
        assert sum(one.num_replays for one in recorder.recordings) == replays + 2


@torch.inference_mode()
def test_tokens_of_other_logits_are_chosen_op_by_op() -> None:
    """Of some of a step's rows, of a prompt's, of more requests than were captured."""
    graph, caches, recorder = captured(*PLANS[0])
    batch = make_batch([NewTokens([index], 0, (index,)) for index in range(3)], caches)
    logits = graph.replay(replace(batch, logits_index=torch.tensor([0, 2])))
    assert logits is not None
    replays = sum(one.num_replays for one in recorder.recordings)
    settings = some_settings(2, 1)
    assert torch.equal(graph.sampling_ops.argmax(logits), logits.argmax(-1))
    assert torch.equal(
        graph.sampling_ops.sample(logits, settings), TorchKernels().sample(logits, settings)
    )
    assert sum(one.num_replays for one in recorder.recordings) == replays


def test_prefill_is_cut_at_each_layers_attention() -> None:
    graph, _, recorder = captured((), (6,))
    num_layers = make_model().config.num_layers
    assert len(recorder.recordings) == num_layers + 1
    assert len(graph.plain.prefills[6].parts) == 2 * num_layers + 1


def test_pairs_of_texts_are_computed_eagerly() -> None:
    graph, caches, _ = captured(*PLANS[0])
    batch = make_batch([NewTokens([1], 0, (0,))], caches)
    assert graph.replay(replace(batch, token_types=torch.zeros(1))) is None


def test_kernels_that_look_at_the_batch_on_the_host_cannot_be_captured() -> None:
    """The torch kernels' own attention: what it computes of the sizes would be repeated."""

    class Looking(DeviceStyle):
        def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
            assert float(x[0, 0]) is not None
            return super().rms_norm(x, weight, eps)

    model = make_decoder(
        llama_config(),
        dict(random_weights(make_model_blank(Looking()).targets(), seed=1, dtype=torch.float32)),
        Looking(),
    )
    recorder = RecordingCapture()
    with pytest.raises(HostLooked):
        capture_steps(model, Looking(), make_caches(), make_plan((1,), ()), recorder)
    assert not recorder.is_open


def make_model_blank(kernels: TorchKernels) -> Decoder:
    build = Build(kernels=kernels, device=CPU, dtype=torch.float32)
    return Decoder.of(read_decoder(llama_config()), build)


def test_the_recorder_repeats_what_the_host_computed() -> None:
    """It is as unforgiving as a GPU: else these tests would prove nothing."""
    source, target = torch.ones(3), torch.zeros(3)
    number = 2.0
    recorder = RecordingCapture()
    replayable = capture(recorder, lambda: target.copy_(source * number + torch.tensor([number])))
    source.fill_(5.0)
    number = 100.0
    replayable.replay()
    assert target.tolist() == [12.0, 12.0, 12.0]


def test_a_cpu_captures_nothing() -> None:
    with pytest.raises(CannotRecord, match="a cpu device captures nothing"):
        capture_on(CPU)
