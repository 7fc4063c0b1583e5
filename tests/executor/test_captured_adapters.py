"""Captured steps with adapters give what the op-by-op model gives, whichever adapters come and go.

Triton's kernels run in the interpreter; launches are recorded as a GPU records them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")

from sapwood.executor.cache_inputs import SparePlaces
from sapwood.executor.captured import StepsWithAdapters, capture_steps
from sapwood.executor.captured_memory import CapturePlan
from sapwood.kernels.low_rank import AdapterRoom, LowRank
from sapwood.kernels.triton import low_rank
from sapwood.kernels.triton.low_rank import TritonCapturedAdapters, TritonLowRank
from sapwood.layers.adapters import AdapterContext, AdapterSite, StepAdapters
from sapwood.layers.build import Build
from sapwood.lora.adapter import adaptable
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.loader.dummy import random_weights
from sapwood.models.registry import read_decoder
from tests.adapters import random_adapter
from tests.executor.device_style import DeviceStyle
from tests.executor.recording_capture import RecordingCapture
from tests.executor.test_captured import MAX_PAGES, NUM_PAGES, PAGE
from tests.kernels.test_low_rank import rows_of
from tests.models.lm.harness import CPU, NewTokens, make_batch, make_kv_caches
from tests.tiny import llama_config

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy

ROOM = AdapterRoom(num_rows=8, num_slots=3, max_rank=5)


class AdaptedStyle(DeviceStyle):
    def low_rank(self, in_size: int, out_size: int) -> TritonLowRank:
        return TritonLowRank(in_size, out_size)

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> TritonCapturedAdapters:
        return TritonCapturedAdapters(room, dtype, device)


def note_launches(monkeypatch: pytest.MonkeyPatch, recorder: RecordingCapture) -> None:
    for name in ("_shrink", "_expand"):
        monkeypatch.setattr(low_rank, name, recorder.noted(getattr(low_rank, name)))


@torch.inference_mode()
def test_replays_give_what_the_ops_give(monkeypatch: pytest.MonkeyPatch) -> None:
    """A prefill, decodes of two captured sizes, slots that change hands, a step without adapters
    and one with an adapter that captures do not have."""
    recorder, context, kernels = RecordingCapture(), AdapterContext(), AdaptedStyle()
    note_launches(monkeypatch, recorder)
    build = Build(kernels=kernels, device=CPU, dtype=torch.float32, adapters=context)
    model = Decoder.of(read_decoder(llama_config(num_hidden_layers=1)), build)
    load_weights(model, random_weights(model.targets(), seed=1, dtype=torch.float32, std=0.2))
    model.finalize()
    config = model.config
    caches, eager_caches = (
        make_kv_caches(config, num_pages=NUM_PAGES, page_size=PAGE) for _ in range(2)
    )
    plan = CapturePlan(
        decode=(2, 4),
        prefill=(8,),
        max_pages=MAX_PAGES,
        page_size=PAGE,
        spares=SparePlaces(pages=(NUM_PAGES - 1,)),
        vocab_size=config.vocab_size,
        dtype=torch.float32,
        device=CPU,
        has_adapters=True,
    )
    fixed = TritonCapturedAdapters(ROOM, torch.float32, CPU)
    targets = adaptable(model.adapter_targets(), model.checkpoint_name, torch.float32).targets
    for site in {target.site for target in targets.values()}:
        fixed.cover(site.layer, 3)
    having = StepsWithAdapters(context, fixed)
    graph = capture_steps(model, kernels, caches, plan, recorder, adapters=having)

    def place(slot: int, adapter: dict[AdapterSite, LowRank]) -> None:
        for target in targets.values():
            target.site.place(slot, adapter.get(target.site))

    def check(news: list[int], slots: list[int], *, is_covered: bool = True) -> None:
        requests, slot_of_token = [], []
        for index, (num, slot) in enumerate(zip(news, slots, strict=True)):
            ids = [(11 * index + 5 * i + computed[index]) % 250 for i in range(num)]
            pages = range(index * MAX_PAGES, (index + 1) * MAX_PAGES)
            requests.append(NewTokens(ids, computed[index], tuple(pages)))
            slot_of_token += [slot] * num
            computed[index] += num
        batch = make_batch(requests, caches)
        adapters = None
        if max(slots) >= 0:
            adapters = StepAdapters(
                rows=rows_of(slot_of_token), selected=rows_of(slots), is_covered=is_covered
            )
        last = batch.attention.query_start[1:].long() - 1
        batch = replace(batch, logits_index=last, adapters=adapters)
        eager = replace(batch, kv_caches=eager_caches)
        eager = replace(eager, attention=replace(eager.attention, cache={}))
        replayed, expected = [], []
        for logits, compute in (
            (replayed, lambda: graph.replay(batch)),
            (expected, lambda: model.compute(eager)),
        ):
            if adapters is None:
                logits.append(compute())
            else:
                with context.of(adapters):
                    logits.append(compute())
        if not is_covered:
            assert replayed == [None]
            return
        torch.testing.assert_close(replayed[0], expected[0], rtol=1e-4, atol=1e-4)
        told.append(expected[0])

    computed, told = [0] * 4, []
    place(0, random_adapter(targets, 2, seed=1))
    place(2, random_adapter(targets, 5, ending="_proj", seed=2))
    check([4, 1, 3], [0, -1, 2])
    check([1, 1, 1, 1], [0, -1, 2, 0])
    check([1, 1], [2, -1])
    place(1, random_adapter(targets, 4, ending="lm_head", seed=3))
    place(0, random_adapter(targets, 3, ending="v_proj", seed=4))
    check([1, 1, 1], [1, 0, -1])
    replays = [one.num_replays for one in recorder.recordings]
    check([1, 1, 1], [-1, -1, -1])
    (plain,) = (
        one
        for one, before in zip(recorder.recordings, replays, strict=True)
        if one.num_replays > before
    )
    adapted = max(recorder.recordings, key=lambda one: len(one.notes))
    num_launches = 2 * len({target.site for target in targets.values()})
    assert len(plain.notes) < len(adapted.notes) - num_launches, "the base's steps do no more"
    check([1], [1], is_covered=False)
    with pytest.raises(ValueError, match="room for slots, parts and ranks"):
        place(0, random_adapter(targets, 6, seed=5))
