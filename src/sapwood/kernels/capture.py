"""Captures: a device records the work that it is given, and repeats all of it in one call.

A captured piece of work reads and writes the same memory each time: the caller writes inputs there
before a replay, and reads results from there afterwards. A number that the host computed during the
capture stays what it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch


class Replayable(Protocol):
    def replay(self) -> None:
        """Repeat the captured work, with the numbers that are in its memory now."""
        ...


class Capture(Protocol):
    """Ops between `begin` and `end` are recorded. One capture at a time."""

    def begin(self) -> None: ...

    def end(self) -> Replayable: ...


def capture(recorder: Capture, work: Callable[[], None]) -> Replayable:
    """Capture the device's part of `work`. If `work` raises, the capture is ended too."""
    recorder.begin()
    try:
        work()
    except BaseException:
        # The same problem has often spoilt the capture; the error of `end` would say less about it.
        with suppress(RuntimeError):
            recorder.end()
        raise
    return recorder.end()


class CudaCapture:
    """CUDA graphs that share one pool of memory, and so are replayed one at a time.

    Work is captured on a stream of this object, since the default stream cannot be captured, and
    replayed on the current stream.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool: Any = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._entered: Any = None
        self._graph: torch.cuda.CUDAGraph | None = None

    def begin(self) -> None:
        torch.cuda.synchronize(self._device)
        self._entered = torch.cuda.stream(self._stream)
        self._entered.__enter__()
        self._graph = torch.cuda.CUDAGraph()
        # Only the work of this thread is captured; other threads may use the device meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replayable:
        assert self._graph is not None, "a capture was begun"
        graph, self._graph = self._graph, None
        try:
            graph.capture_end()
        finally:
            self._entered.__exit__(None, None, None)
        return graph
