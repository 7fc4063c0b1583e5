"""The loop that draws, with a pipeline of numbers and a clock that stands still."""

from __future__ import annotations

from typing import Any

import pytest

from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.clock import ManualClock
from sapwood.base.errors import InvalidRequest
from sapwood.diffusion.loop import PaintingLoop, partial_steps
from sapwood.diffusion.memory import PictureMemory
from sapwood.diffusion.scheduler import PaintingLimits, StepScheduler
from sapwood.schema.painting import (
    ChangeLoras,
    DrainPainter,
    GetPainterStatus,
    ListLoras,
    LoraList,
    LorasAnswer,
    LoraWish,
    Paint,
    PaintDone,
    PainterStatus,
    PaintFailed,
    PaintProgress,
    PictureOptions,
    StopPainting,
)
from tests.diffusion.pipelines import CountingPipeline


class Driven:
    """A loop with the messages that it has sent."""

    def __init__(
        self,
        *,
        text_cache_bytes: int = 1000,
        tiles: int = 3,
        adapters: Any = None,
        room: PictureMemory | None = None,
        **limits: int,
    ) -> None:
        self.pipeline = CountingPipeline(tiles=tiles)
        self.clock = ManualClock()
        self.inbox: QueueChannel[Any] = QueueChannel()
        self.sent: list[Any] = []
        self.loop = PaintingLoop(
            self.pipeline,
            StepScheduler(PaintingLimits(**limits), self.clock),
            self.inbox,
            CallbackSender(self.sent.append),
            clock=self.clock,
            text_cache_bytes=text_cache_bytes,
            adapters=adapters,
            room=room,
        )

    def ask(self, name: str, prompt: str = "a tree", *, seed: int = 0, **fields: Any) -> None:
        options = {key: fields.pop(key) for key in list(fields) if key in OPTIONS}
        self.inbox.send(
            Paint(
                request_id=name,
                prompt=prompt,
                seed=seed,
                options=PictureOptions(**options),
                **fields,
            )
        )

    def turns(self, number: int) -> None:
        for _ in range(number):
            self.loop.turn(0.0)

    def of(self, name: str, kind: type) -> list[Any]:
        return [
            message
            for message in self.sent
            if isinstance(message, kind) and message.request_id == name
        ]

    def status(self) -> PainterStatus:
        self.inbox.send(GetPainterStatus("s"))
        self.turns(1)
        return next(each for each in reversed(self.sent) if isinstance(each, PainterStatus))


OPTIONS = set(PictureOptions.__struct_fields__)


def test_a_picture_is_drawn_step_by_step() -> None:
    driven = Driven()
    driven.ask("a", "tree", seed=7, num_inference_steps=3, width=8, height=16)
    driven.turns(20)
    assert [event.step for event in driven.of("a", PaintProgress)] == [1, 2, 3]
    (done,) = driven.of("a", PaintDone)
    assert (done.picture.width, done.picture.height, done.picture.channels) == (8, 16, 3)
    assert set(done.picture.pixels) == {7 + 3 * len("tree")}
    assert driven.loop.num_held == 0


def test_what_does_not_fit_into_memory_is_refused_before_it_takes_any() -> None:
    room = PictureMemory(
        free_bytes=10_000, bytes_per_token=1000, bytes_per_pixel=10, piece_pixels=None,
        pixels_per_token=64,
    )  # fmt: skip
    driven = Driven(room=room)
    driven.ask("fits", width=16, height=32)
    driven.ask("pixels", width=1024, height=1024)
    driven.ask("tokens", width=24, height=32, negative_prompt="x", prompt="a wood")
    driven.turns(20)
    assert driven.of("fits", PaintDone)
    (pixels,), (tokens,) = driven.of("pixels", PaintFailed), driven.of("tokens", PaintFailed)
    assert (pixels.status, pixels.param) == (400, "size")
    assert "at most 1000 pixels" in pixels.message
    assert "24 tokens" in tokens.message
    assert driven.pipeline.encoded == ["a tree", "a wood", "x"], "nothing was done for `pixels`"
    assert driven.loop.num_held == 0


def test_pictures_at_different_steps_share_calls_and_keep_their_own_numbers() -> None:
    driven = Driven()
    driven.ask("a", "tree", num_inference_steps=6)
    driven.turns(4)
    driven.ask("b", "a wood", seed=1, num_inference_steps=4, negative_prompt="x")
    driven.turns(20)
    assert max(driven.pipeline.batches) == 3, "one row of a, two passes of b"
    (a,), (b,) = driven.of("a", PaintDone), driven.of("b", PaintDone)
    assert set(a.picture.pixels) == {24}
    assert set(b.picture.pixels) == {1 + 4 * len("a wood")}


def test_a_known_text_is_not_encoded_again() -> None:
    driven = Driven()
    for name in "abc":
        driven.ask(name, "tree", negative_prompt="ugly")
    driven.turns(30)
    assert sorted(driven.pipeline.encoded) == ["tree", "ugly"]
    assert driven.status().num_text_hits == 4


def test_without_room_for_vectors_every_text_is_encoded() -> None:
    driven = Driven(text_cache_bytes=0)
    for name in "ab":
        driven.ask(name, "tree")
    driven.turns(30)
    assert driven.pipeline.encoded == ["tree", "tree"]


def test_decoding_a_large_picture_holds_up_others_by_a_tile_per_turn() -> None:
    driven = Driven(tiles=50)
    driven.ask("large", num_inference_steps=1)
    driven.turns(5)
    driven.ask("small", num_inference_steps=4)
    before = len(driven.pipeline.pieces)
    driven.turns(8)
    assert len(driven.of("small", PaintProgress)) == 4
    assert len(driven.pipeline.pieces) - before <= 8
    assert not driven.of("large", PaintDone)


@pytest.mark.parametrize("after", [0, 1, 2, 4, 7])
def test_an_abort_in_any_phase_leaves_nothing(after: int) -> None:
    driven = Driven()
    driven.ask("a", num_inference_steps=3)
    driven.turns(after)
    driven.inbox.send(StopPainting("a"))
    driven.turns(1)
    (failed,) = driven.of("a", PaintFailed)
    assert failed.kind == "aborted"
    assert driven.loop.num_held == 0
    driven.turns(5)
    assert not driven.of("a", PaintDone)


def test_a_deadline_is_kept() -> None:
    driven = Driven()
    driven.ask("a", num_inference_steps=100, timeout_s=5.0)
    driven.turns(10)
    driven.clock.advance(5.0)
    driven.turns(1)
    (failed,) = driven.of("a", PaintFailed)
    assert (failed.kind, failed.status) == ("late", 504)
    assert "5 s" in failed.message
    assert driven.loop.num_held == 0


def test_a_refusal_of_the_pipeline_ends_that_picture_alone() -> None:
    driven = Driven()
    driven.ask("a", "refuse")
    driven.ask("b")
    driven.turns(20)
    (failed,) = driven.of("a", PaintFailed)
    assert (failed.status, failed.param) == (400, "prompt")
    assert driven.of("b", PaintDone)


def test_a_bug_in_one_pictures_work_ends_that_picture_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    driven = Driven()
    driven.ask("a", "stumble")
    driven.ask("b")
    driven.turns(20)
    (failed,) = driven.of("a", PaintFailed)
    assert (failed.kind, failed.status) == ("failed", 500)
    assert "IndexError" in caplog.text
    assert driven.of("b", PaintDone)
    assert driven.loop.num_held == 0


def test_a_bug_in_the_transformer_ends_the_loop() -> None:
    driven = Driven()
    driven.ask("a", "break")
    with pytest.raises(RuntimeError, match="a bug of ours"):
        driven.turns(10)


def test_partial_pictures_come_evenly_and_before_the_last_step() -> None:
    driven = Driven()
    driven.ask("a", "tree", num_inference_steps=6, num_partial=2)
    driven.turns(20)
    partial = [event for event in driven.of("a", PaintProgress) if event.partial is not None]
    assert [event.step for event in partial] == [2, 4]
    assert [set(event.partial.pixels) for event in partial] == [{8}, {16}]


@pytest.mark.parametrize(
    ("num_partial", "num_steps", "wanted"),
    [(0, 5, set()), (1, 4, {2}), (3, 4, {1, 2, 3}), (3, 2, {1}), (3, 1, set())],
)
def test_after_which_steps_a_picture_is_shown(
    num_partial: int, num_steps: int, wanted: set[int]
) -> None:
    assert partial_steps(num_partial, num_steps) == wanted


def test_a_drain_ends_open_pictures_in_time_and_refuses_new_ones() -> None:
    driven = Driven()
    driven.ask("open", num_inference_steps=3)
    driven.turns(2)
    driven.inbox.send(DrainPainter(60.0))
    driven.ask("new")
    driven.loop.run()
    assert driven.of("open", PaintDone)
    (refused,) = driven.of("new", PaintFailed)
    assert refused.status == 503


def test_forty_pictures_with_ten_aborts_leave_nothing() -> None:
    driven = Driven(max_running=6, max_step_tokens=64)
    for place in range(40):
        size = 16 * (1 + place % 4)
        driven.ask(
            f"p{place}",
            f"tree {place % 7}",
            seed=place,
            num_inference_steps=1 + place % 5,
            width=size,
            height=size,
            priority=place % 3,
        )
        driven.turns(1)
        if place % 4 == 3:
            driven.inbox.send(StopPainting(f"p{place - 3}"))
    driven.turns(800)
    ends = [
        (*driven.of(f"p{place}", PaintDone), *driven.of(f"p{place}", PaintFailed))
        for place in range(40)
    ]
    assert all(len(own) == 1 for own in ends), "exactly one end each"
    for place, (end,) in enumerate(ends):
        if isinstance(end, PaintDone):
            number = len(f"tree {place % 7}")
            assert set(end.picture.pixels) == {(place + number * (1 + place % 5)) % 256}
    assert driven.loop.num_held == 0
    status = driven.status()
    assert status.num_done + status.num_aborted == 40
    assert (status.num_waiting, status.num_denoising, status.num_decoding) == (0, 0, 0)


class Adapters:
    """Tells how many pictures were sent when it was changed."""

    def __init__(self) -> None:
        self.components = {"transformer": None}
        self.driven: Driven | None = None
        self.changed_at: list[list[str]] = []

    def set(self, wishes: Any) -> None:
        assert self.driven is not None
        if wishes[0].nickname == "bad":
            raise InvalidRequest("no such file", param="lora_path")
        done = [each.request_id for each in self.driven.sent if isinstance(each, PaintDone)]
        self.changed_at.append(done)

    def unmerge(self, target: str) -> None:
        raise InvalidRequest("no LoRA adapter is set", param="target")

    def listing(self) -> LoraList:
        return LoraList(loaded_adapters=(), active={})


def changed(call_id: str, nickname: str = "ink") -> ChangeLoras:
    return ChangeLoras(call_id=call_id, kind="set", wishes=(LoraWish(nickname=nickname),))


def test_adapters_change_after_the_pictures_before_and_before_those_after() -> None:
    adapters = Adapters()
    driven = adapters.driven = Driven(adapters=adapters)
    driven.ask("a", "oak", num_inference_steps=3)
    driven.turns(2)
    driven.inbox.send(changed("1"))
    driven.ask("b", "oak", num_inference_steps=1)
    driven.inbox.send(changed("2"))
    driven.ask("c", "oak", num_inference_steps=1)
    driven.turns(40)
    assert adapters.changed_at == [["a"], ["a", "b"]]
    assert [each.request_id for each in driven.sent if isinstance(each, PaintDone)] == [*"abc"]
    assert driven.pipeline.encoded == ["oak"] * 3, "an adapter may change the encoder"
    answers = [each for each in driven.sent if isinstance(each, LorasAnswer)]
    assert [(each.call_id, each.refusal) for each in answers] == [("1", None), ("2", None)]


def test_a_refused_change_holds_nobody_up() -> None:
    adapters = Adapters()
    driven = adapters.driven = Driven(adapters=adapters)
    driven.inbox.send(changed("1", "bad"))
    driven.inbox.send(ChangeLoras(call_id="2", kind="unmerge"))
    driven.ask("a", num_inference_steps=1)
    driven.turns(20)
    answers = [each for each in driven.sent if isinstance(each, LorasAnswer)]
    assert [(each.status, each.param) for each in answers] == [(400, "lora_path"), (400, "target")]
    assert driven.of("a", PaintDone)


def test_who_waits_for_a_change_keeps_its_deadline_and_may_leave() -> None:
    adapters = Adapters()
    driven = adapters.driven = Driven(adapters=adapters)
    driven.ask("long", num_inference_steps=100)
    driven.inbox.send(changed("1"))
    driven.ask("late", timeout_s=5.0)
    driven.ask("gone")
    driven.turns(5)
    driven.clock.advance(6.0)
    driven.inbox.send(StopPainting("gone"))
    driven.turns(1)
    assert driven.of("late", PaintFailed)[0].status == 504
    driven.inbox.send(StopPainting("long"))
    driven.turns(2)
    assert adapters.changed_at == [[]]
    assert not driven.loop.num_held


def test_a_pipeline_without_adapters_refuses_changes() -> None:
    driven = Driven()
    driven.inbox.send(changed("1"))
    driven.inbox.send(ListLoras("2"))
    driven.turns(1)
    listed, refused = driven.sent
    assert refused.status == 400
    assert "through diffusers" in refused.refusal
    assert listed.listing.loaded_adapters == ()
