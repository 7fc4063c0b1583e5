"""When a profile begins and ends, counted in steps; `executor/profiler.py` does the recording.

A profile starts as soon as it is ordered, or at `start_step`. It ends when somebody stops it, or
after `num_steps`. With `by_stage`, steps with prompt tokens (prefill) go into one file and steps
without (decode) into another.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from sapwood.base.errors import InvalidRequest

Stage = Literal["prefill", "decode"]
ACTIVITIES = ("CPU", "GPU")
_MAX_STEPS = 100_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileOrder:
    """What a profile records.

    folder      folder of its files
    name        beginning of the files' names
    start_step  the engine's step at which the profile begins; None: the next one
    num_steps   steps to record, per stage with by_stage; None: until somebody stops the profile
    with_stack  whether Python stacks are recorded
    record_shapes  whether shapes of operands are recorded
    """

    folder: Path
    name: str
    start_step: int | None = None
    num_steps: int | None = None
    activities: Sequence[str] = ACTIVITIES
    by_stage: bool = False
    with_stack: bool = False
    record_shapes: bool = False

    def __post_init__(self) -> None:
        unknown = sorted(set(self.activities) - set(ACTIVITIES))
        if unknown or not self.activities:
            raise InvalidRequest(
                f"activities has {', '.join(unknown) or 'nothing'}; this server records "
                f"{' and '.join(ACTIVITIES)}",
                param="activities",
            )
        if self.start_step is not None and self.start_step < 0:
            raise InvalidRequest(
                f"start_step is {self.start_step} but must be at least 0", param="start_step"
            )
        if self.num_steps is not None and not 1 <= self.num_steps <= _MAX_STEPS:
            raise InvalidRequest(
                f"num_steps is {self.num_steps} but must be from 1 to {_MAX_STEPS}",
                param="num_steps",
            )
        if self.by_stage and self.num_steps is None:
            raise InvalidRequest(
                "profile_by_stage needs num_steps, the steps of each stage", param="num_steps"
            )


def default_folder() -> Path:
    return Path(tempfile.gettempdir()) / "sapwood-profiles"


class Recorder(Protocol):
    """Records what all threads of the process do between `start` and `stop`."""

    def start(self, order: ProfileOrder) -> None:
        """Begin to record; OSError if that fails."""
        ...

    def stop(self, path: Path) -> None:
        """End and write the recording; OSError if it cannot be written."""
        ...


class ProfileSession:
    """At most one profile at a time. Called by the engine's loop around its steps."""

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder
        self._order: ProfileOrder | None = None
        self._recording: Stage | Literal["all"] | None = None
        self._left: dict[str, int] = {}
        self._files: list[Path] = []

    @property
    def is_active(self) -> bool:
        return self._order is not None

    def begin(self, order: ProfileOrder) -> str:
        """Take an order, and say in words when the profile begins.

        Raises InvalidRequest if another profile is in progress.
        """
        if self._order is not None:
            raise InvalidRequest("a profile is being recorded; POST /stop_profile ends it")
        try:
            order.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InvalidRequest(
                f"the folder {order.folder} cannot be made: {error}", param="output_dir"
            ) from error
        self._order = order
        self._files = []
        stages = ("prefill", "decode") if order.by_stage else ("all",)
        self._left = dict.fromkeys(stages, order.num_steps or 0)
        if order.start_step is None and not order.by_stage:
            self._start("all")
        return f"recording into {order.folder}"

    def end(self) -> list[Path]:
        """End the profile; returns its files. InvalidRequest if none is in progress."""
        if self._order is None:
            raise InvalidRequest("no profile is being recorded; POST /start_profile begins one")
        try:
            self._stop()
        finally:
            self._order = None
        return self._files

    def before_step(self, step: int, stage: Stage) -> None:
        order = self._order
        if order is None or (order.start_step is not None and step < order.start_step):
            return
        wanted: Stage | Literal["all"] = stage if order.by_stage else "all"
        if self._recording not in (None, wanted):
            self._stop()
        if self._recording is None and (order.num_steps is None or self._left[wanted] > 0):
            self._start(wanted)

    def after_step(self) -> list[Path] | None:
        """Count a step; returns the profile's files if this step was its last."""
        order = self._order
        if order is None or order.num_steps is None or self._recording is None:
            return None
        self._left[self._recording] -= 1
        if not any(self._left.values()):
            return self.end()
        if self._left[self._recording] == 0:
            try:
                self._stop()
            except OSError:
                self._order = None
                raise
        return None

    def _start(self, what: Stage | Literal["all"]) -> None:
        assert self._order is not None
        try:
            self._recorder.start(self._order)
        except OSError:
            self._order = None
            raise
        self._recording = what

    def _stop(self) -> None:
        if self._recording is None:
            return
        assert self._order is not None
        stage = "" if self._recording == "all" else f"-{self._recording}"
        path = self._order.folder / f"{self._order.name}{stage}-{len(self._files)}.trace.json.gz"
        self._recording = None
        self._recorder.stop(path)
        self._files.append(path)
