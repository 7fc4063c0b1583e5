"""The one loop of an engine that draws: messages in, turns through the pipeline, messages out."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood.base.channel import Receiver, Sender
from sapwood.base.clock import Clock
from sapwood.base.errors import SapwoodError
from sapwood.diffusion.lora_changes import LoraChanges
from sapwood.diffusion.memory import PictureMemory
from sapwood.diffusion.scheduler import Phase, StepScheduler, refused
from sapwood.diffusion.text_cache import TextCache
from sapwood.pipelines.interface import (
    PictureRequest,
    Pipeline,
    PromptText,
    PromptVectors,
    Trajectory,
)
from sapwood.pipelines.loras import PictureAdapters
from sapwood.schema.painting import (
    ChangeLoras,
    DrainPainter,
    GetPainterStatus,
    InputPicture,
    ListLoras,
    Paint,
    PaintDone,
    PainterInput,
    PainterOutput,
    PainterStatus,
    PaintFailed,
    PaintProgress,
    Picture,
    PictureOptions,
    PipelineTraits,
    StopPainting,
)

log = logging.getLogger(__name__)

DRAIN_POLL_S = 0.1


class Heartbeat(Protocol):
    """Is told what the engine does, so that somebody notices when it does nothing any more."""

    def beat(self, doing: str) -> None: ...

    def rest(self) -> None: ...


@dataclass(slots=True, eq=False)
class _Work:
    """What a picture has in memory: all of it goes when the picture is finished."""

    preparing: Generator[None, None, Trajectory]
    trajectory: Trajectory | None = None
    decoding: Generator[None, None, Tensor] | None = None
    partial_steps: frozenset[int] = frozenset()


@dataclass(slots=True)
class _Counts:
    num_steps: int = 0
    num_rows: int = 0
    num_trajectory_steps: int = 0
    num_done: int = 0
    ended: dict[str, int] = field(
        default_factory=lambda: {"refused": 0, "aborted": 0, "late": 0, "failed": 0}
    )


class PaintingLoop:
    """Runs until it is drained.

    An error of one picture's own work ends that picture. A bug in the transformer, which computes
    many, ends the loop: `run` raises it.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        scheduler: StepScheduler,
        receiver: Receiver[PainterInput],
        sender: Sender[PainterOutput],
        *,
        clock: Clock,
        text_cache_bytes: int,
        adapters: PictureAdapters | None = None,
        heartbeat: Heartbeat | None = None,
        room: PictureMemory | None = None,
        memory: Callable[[], tuple[int, int]] = lambda: (0, 0),
    ) -> None:
        """A loop that has not begun.

        adapters  of the pipeline; None: it has none
        room      what pictures may take in memory; None: nobody knows, and none is refused
        memory    (bytes that the process has, the most that it has had)
        """
        self._pipeline = pipeline
        self._scheduler = scheduler
        self._receiver = receiver
        self._sender = sender
        self._clock = clock
        self._heartbeat = heartbeat
        self._memory = memory
        self._room = room
        self._texts: TextCache[PromptText, PromptVectors] = TextCache(text_cache_bytes)
        self._works: dict[str, _Work] = {}
        self._counts = _Counts()
        self._drain_until_s = math.inf
        self._changes = LoraChanges(adapters, self._texts.clear)

    def run(self) -> None:
        with torch.inference_mode():
            while not (self._is_draining and not self._has_work):
                self.turn(self._patience_s())

    def turn(self, timeout_s: float | None) -> None:
        """Take in messages, waiting up to `timeout_s` for the first; then do one turn's work."""
        for message in self._receiver.receive(timeout_s):
            self._take(message)
        self._end_overdue()
        self._change_adapters()
        turn = self._scheduler.plan()
        if self._heartbeat is not None and not turn.is_empty:
            self._heartbeat.beat(f"a step of {len(turn.step)} pictures")
        if turn.prepare is not None:
            self._prepare(turn.prepare)
        if turn.step:
            self._step(turn.step)
        if turn.decode is not None:
            self._decode(turn.decode)
        if self._heartbeat is not None and not self._scheduler.has_work:
            self._heartbeat.rest()

    @property
    def num_held(self) -> int:
        """Pictures that have something in memory."""
        return len(self._works)

    # ---- messages ----------------------------------------------------------------------------

    @property
    def _is_draining(self) -> bool:
        return self._drain_until_s < math.inf

    @property
    def _has_work(self) -> bool:
        return self._scheduler.has_work or len(self._changes) > 0

    def _patience_s(self) -> float | None:
        if self._has_work:
            return 0.0
        return DRAIN_POLL_S if self._is_draining else None

    def _change_adapters(self) -> None:
        """As soon as no picture needs the old ones."""
        while self._changes and self._scheduler.is_clear:
            self._sender.send(self._changes.make_next())
            self._scheduler.reopen()

    def _take(self, message: PainterInput) -> None:
        match message:
            case Paint():
                self._add(message)
            case StopPainting():
                self._end(message.request_id, "aborted", "the picture is not wanted any more", 499)
            case DrainPainter():
                until_s = self._clock.now_s() + message.timeout_s
                # A second order may hurry a drain, but not delay it.
                self._drain_until_s = min(self._drain_until_s, until_s)
            case GetPainterStatus():
                self._sender.send(self._status(message.call_id))
            case ChangeLoras():
                self._changes.add(message)
                self._scheduler.close()
            case ListLoras():
                self._sender.send(self._changes.listing(message.call_id))

    def _add(self, request: Paint) -> None:
        failure: PaintFailed | None
        if self._is_draining:
            failure = PaintFailed(
                request_id=request.request_id,
                kind="refused",
                message="the server is shutting down",
                status=503,
                error_type="ServiceUnavailableError",
            )
        else:
            failure = self._scheduler.add(request)
        if failure is not None:
            self._counts.ended[failure.kind] += 1
            self._sender.send(failure)

    def _end_overdue(self) -> None:
        for request_id in self._scheduler.overdue():
            timeout_s = self._scheduler.state(request_id).request.timeout_s
            self._end(request_id, "late", f"the picture was not done within {timeout_s:g} s", 504)
        if self._clock.now_s() >= self._drain_until_s:
            for request_id in self._scheduler.open_ids:
                self._end(request_id, "aborted", "the server is shutting down", 503)

    # ---- the stages --------------------------------------------------------------------------

    def _prepare(self, request_id: str) -> None:
        work = self._works.get(request_id)
        if work is None:
            request = self._scheduler.state(request_id).request
            work = self._works[request_id] = _Work(self._prepared(request))
        with self._refusing(request_id) as went_well:
            try:
                next(work.preparing)
            except StopIteration as end:
                trajectory: Trajectory = end.value
                work.trajectory = trajectory
                paint = self._scheduler.state(request_id).request
                work.partial_steps = partial_steps(paint.num_partial, trajectory.num_steps)
                self._scheduler.prepared(request_id, trajectory.num_tokens)
        if went_well and work.trajectory is not None and _is_done(work.trajectory):
            self._scheduler.denoised(request_id)

    def _prepared(self, paint: Paint) -> Generator[None, None, Trajectory]:
        """Encode the texts, then draw the noise; yields between pieces of the work.

        Raises InvalidRequest for a picture that does not fit into memory, before it takes any."""
        if self._room is not None:
            self._room.check_pixels(drawn_pixels(paint.options, self._pipeline.traits))
        request = picture_request(paint)
        vectors: list[PromptVectors] = []
        for text in self._pipeline.texts(request):
            # Vectors that a picture took part in are this request's own.
            is_shared = not text.images
            known = self._texts.get(text) if is_shared else None
            if known is None:
                known = self._pipeline.encode(text)
                if is_shared:
                    self._texts.put(text, known)
                yield
            vectors.append(known)
        trajectory = yield from self._pipeline.begin(request, vectors)
        if self._room is not None:
            self._room.check_tokens(trajectory.num_tokens)
        return trajectory

    def _step(self, request_ids: tuple[str, ...]) -> None:
        """One call of the transformer, with the rows of these pictures."""
        going: list[tuple[str, Trajectory, list[Any]]] = []
        for request_id in request_ids:
            trajectory = self._works[request_id].trajectory
            assert trajectory is not None, "the scheduler steps what has been prepared"
            going.append((request_id, trajectory, trajectory.rows()))
        rows = [row for _, _, own in going for row in own]
        if len(going) == 1:
            with _Refusing(request_ids[0], self._fail, isolates=False) as went_well:
                predictions = self._pipeline.predict(rows)
            if not went_well:
                return
        else:
            predictions = self._pipeline.predict(rows)
        self._counts.num_steps += 1
        self._counts.num_rows += len(rows)
        first = 0
        for request_id, trajectory, own in going:
            with self._refusing(request_id):
                trajectory.advance(predictions[first : first + len(own)])
                self._stepped(request_id, trajectory)
            first += len(own)

    def _stepped(self, request_id: str, trajectory: Trajectory) -> None:
        self._counts.num_trajectory_steps += 1
        work = self._works[request_id]
        partial = None
        if trajectory.num_done in work.partial_steps and not _is_done(trajectory):
            partial = picture_of(_last(self._pipeline.finish(trajectory)))
        self._sender.send(
            PaintProgress(
                request_id=request_id,
                step=trajectory.num_done,
                num_steps=trajectory.num_steps,
                partial=partial,
            )
        )
        if _is_done(trajectory):
            self._scheduler.denoised(request_id)

    def _decode(self, request_id: str) -> None:
        work = self._works[request_id]
        trajectory = work.trajectory
        assert trajectory is not None, "the scheduler decodes what has been denoised"
        with self._refusing(request_id):
            if work.decoding is None:
                work.decoding = self._pipeline.finish(trajectory)
            try:
                next(work.decoding)
            except StopIteration as end:
                self._done(request_id, trajectory, end.value)

    def _done(self, request_id: str, trajectory: Trajectory, pixels: Tensor) -> None:
        picture = picture_of(pixels)
        state = self._scheduler.finish(request_id)
        assert state is not None, "it was open a moment ago"
        del self._works[request_id]
        self._counts.num_done += 1
        now_s = self._clock.now_s()
        started_s = now_s if state.started_s is None else state.started_s
        self._sender.send(
            PaintDone(
                request_id=request_id,
                picture=picture,
                num_steps=trajectory.num_steps,
                queue_s=started_s - state.arrived_s,
                paint_s=now_s - state.arrived_s,
                peak_bytes=self._memory()[1],
            )
        )

    # ---- ends --------------------------------------------------------------------------------

    def _end(self, request_id: str, kind: Any, message: str, status: int) -> None:
        """End an open picture without a picture; nothing happens if it is not open."""
        error_type = "ServiceUnavailableError" if status == 503 else "BadRequestError"
        self._fail(
            PaintFailed(
                request_id=request_id,
                kind=kind,
                message=message,
                status=status,
                error_type="TimeoutError" if kind == "late" else error_type,
            )
        )

    def _fail(self, failure: PaintFailed) -> None:
        if self._scheduler.finish(failure.request_id) is None:
            return
        work = self._works.pop(failure.request_id, None)
        if work is not None:
            work.preparing.close()
            if work.decoding is not None:
                work.decoding.close()
        self._counts.ended[failure.kind] += 1
        self._sender.send(failure)

    def _refusing(self, request_id: str) -> _Refusing:
        return _Refusing(request_id, self._fail)

    def _status(self, call_id: str) -> PainterStatus:
        resident_bytes, peak_bytes = self._memory()
        counts, count = self._counts, self._scheduler.count
        return PainterStatus(
            call_id=call_id,
            num_waiting=count(Phase.WAITING) + count(Phase.PREPARING),
            num_denoising=count(Phase.DENOISING),
            num_decoding=count(Phase.DECODING),
            num_steps=counts.num_steps,
            num_rows=counts.num_rows,
            num_trajectory_steps=counts.num_trajectory_steps,
            num_done=counts.num_done,
            num_failed=counts.ended["failed"],
            num_aborted=counts.ended["aborted"],
            num_late=counts.ended["late"],
            num_refused=counts.ended["refused"],
            num_text_hits=self._texts.num_hits,
            num_text_misses=self._texts.num_misses,
            text_bytes=self._texts.num_bytes,
            resident_bytes=resident_bytes,
            peak_bytes=peak_bytes,
        )


class _Refusing:
    """An error ends the picture that it is about. Counts as true afterwards if there was none.

    isolates  whether bugs do so, too: where only one picture is worked on, what a request asks for
              must not end the engine. In the transformer they end it: its state may be broken
    """

    def __init__(
        self, request_id: str, fail: Callable[[PaintFailed], None], *, isolates: bool = True
    ) -> None:
        self._request_id = request_id
        self._fail = fail
        self._isolates = isolates
        self._error: BaseException | None = None

    def __bool__(self) -> bool:
        return self._error is None

    def __enter__(self) -> _Refusing:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if error is None:
            return False
        self._error = error
        if not isinstance(error, SapwoodError):
            if not self._isolates or not isinstance(error, Exception):
                return False
            log.error("the picture %s failed", self._request_id, exc_info=error)
            error = SapwoodError(
                "the server failed on this picture; its log says why, and other settings (more "
                "steps, another size) may work"
            )
        if error.status == 400:
            self._fail(refused(self._request_id, error.message, param=error.param))
        else:
            self._fail(
                PaintFailed(
                    request_id=self._request_id,
                    kind="failed",
                    message=error.message,
                    status=error.status,
                    error_type=error.type,
                )
            )
        return True


def partial_steps(num_partial: int, num_steps: int) -> frozenset[int]:
    """After how many steps a picture is shown on its way: evenly, never after the last one."""
    wanted = min(num_partial, num_steps - 1)
    return frozenset(num_steps * (place + 1) // (wanted + 1) for place in range(wanted))


def drawn_pixels(options: PictureOptions, traits: PipelineTraits) -> int:
    """Of the picture that will be drawn; 0 if the pipeline does not tell.

    Without a size it is the usual one, or that of the picture that is drawn over."""
    width, height = traits.defaults.width or 0, traits.defaults.height or 0
    if options.pictures and traits.draws_over_picture:
        width, height = options.pictures[0].width, options.pictures[0].height
    return (options.width or width) * (options.height or height)


def picture_request(paint: Paint) -> PictureRequest:
    options = paint.options
    mask = None
    if options.mask is not None:
        first = options.pictures[0]
        mask = _levels(options.mask, (first.height, first.width))
    return PictureRequest(
        prompt=paint.prompt,
        negative_prompt=options.negative_prompt,
        height=options.height,
        width=options.width,
        num_inference_steps=options.num_inference_steps,
        guidance_scale=options.guidance_scale,
        true_cfg_scale=options.true_cfg_scale,
        seed=paint.seed,
        images=tuple(_pixels(picture) for picture in options.pictures),
        mask=mask,
        strength=options.strength,
        max_sequence_length=options.max_sequence_length,
        num_frames=options.num_frames,
        guidance_scale_2=options.guidance_scale_2,
    )


def _pixels(picture: InputPicture) -> Tensor:
    return _levels(picture.pixels, (picture.height, picture.width, 3))


def _levels(levels: bytes, shape: tuple[int, ...]) -> Tensor:
    return torch.frombuffer(bytearray(levels), dtype=torch.uint8).view(shape)


def picture_of(pixels: Tensor) -> Picture:
    """pixels: [height, width, channels] uint8, or [frames, height, width, channels]"""
    height, width, channels = pixels.shape[-3:]
    raw = pixels.cpu().contiguous().numpy().tobytes()
    return Picture(
        width=width,
        height=height,
        channels=channels,
        pixels=raw,
        num_frames=len(pixels) if pixels.dim() == 4 else 1,
    )


def _is_done(trajectory: Trajectory) -> bool:
    return trajectory.num_done >= trajectory.num_steps


def _last(work: Iterator[None]) -> Tensor:
    """Do all of the work at once."""
    while True:
        try:
            next(work)
        except StopIteration as end:
            result: Tensor = end.value
            return result
