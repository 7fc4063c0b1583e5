"""Recording what a device is asked to do, so that it does the same again in one call.

What is captured reads and writes the same memory each time: inputs are written into it before a
replay, results read from it after. A number that the host computed during the capture is repeated
as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, Protocol

import torch

from sapwood.kernels.recording import CannotRecord


class Replayable(Protocol):
    def replay(self) -> None:
        """Do again what was captured, on what is in the same memory now."""
        ...


class Capture(Protocol):
    """Ops between `begin` and `end` are recorded. One capture at a time."""

    def begin(self) -> None: ...

    def end(self) -> Replayable: ...


def capture(recorder: Capture, work: Callable[[], None]) -> Replayable:
    """All that `work` asks of the device. If it raises, nothing is left open."""
    recorder.begin()
    try:
        work()
    except BaseException:
        # What went wrong has often spoilt the capture too, whose own error would say less.
        with suppress(RuntimeError):
            recorder.end()
        raise
    return recorder.end()


def capture_on(device: torch.device) -> Capture:
    """Raises CannotRecord if that device has no such thing."""
    if device.type != "cuda":
        raise CannotRecord(f"a {device.type} device captures nothing")
    return CudaCapture(device)


class CudaCapture:
    """CUDA graphs that share one pool of memory, and so are replayed one at a time.

    Captured on a stream of its own, since the default one cannot be; replayed on the current one.
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
        # Other threads may do what they like meanwhile: only this one's work is captured.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def end(self) -> Replayable:
        assert self._graph is not None, "a capture was begun"
        graph, self._graph = self._graph, None
        try:
            graph.capture_end()
        finally:
            self._entered.__exit__(None, None, None)
        return graph
