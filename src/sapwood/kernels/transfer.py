"""Copies between host and device that do not wait until the device has finished earlier work.

A copy from ordinary memory waits for all earlier work of the device; a copy from page-locked memory
is queued like any other work. The allocator of page-locked memory hands a piece out again only when
the copies from it are done, so that nothing here has to remember them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.kernels.accelerators import accelerator_of

_ALIGNMENT = 16
"""An array among others begins at a multiple of this number of bytes, which suits every dtype."""


class Download(Protocol):
    """A tensor on its way to the host."""

    def wait(self) -> Tensor:
        """The tensor on the host, once the device has computed and copied it."""
        ...


@dataclass(frozen=True, slots=True)
class Here:
    """A download of a tensor that was on the host already."""

    value: Tensor

    def wait(self) -> Tensor:
        return self.value


@dataclass(frozen=True, slots=True)
class _Arriving:
    host: Tensor
    event: torch.Event

    def wait(self) -> Tensor:
        self.event.synchronize()
        return self.host


def runs_ahead(device: torch.device) -> bool:
    """Whether the device queues its work, so that the host goes on meanwhile."""
    return accelerator_of(device) is not None


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its queued work."""
    if runs_ahead(device):
        torch.get_device_module(device).synchronize(device)


class SideQueue:
    """A queue of work for the device beside the one of the steps. A CPU has no queues."""

    def __init__(self, device: torch.device) -> None:
        self._stream: Any = None
        self._torch: Any = None
        if runs_ahead(device):
            self._torch = torch.get_device_module(device)
            self._stream = self._torch.Stream(device)

    @contextmanager
    def used(self) -> Iterator[None]:
        """What this thread queues inside goes into this queue, and is done at the end."""
        if self._stream is None:
            yield
            return
        with self._torch.stream(self._stream):
            yield
        self._stream.synchronize()

    def mark(self) -> Callable[[], None]:
        """Returns what waits until all that this thread has queued so far is done."""
        if self._stream is None:
            return lambda: None
        event = self._torch.Event()
        event.record(self._torch.current_stream(self._stream.device))
        synchronize: Callable[[], None] = event.synchronize
        return synchronize


class CopyQueue(Protocol):
    """A queue of work beside that of the steps, for copies on which steps wait."""

    def follow(self) -> None:
        """Begin what comes next after all that the steps' queue has so far."""
        ...

    def used(self) -> AbstractContextManager[None]:
        """What this thread queues inside goes into this queue; nobody waits at the end."""
        ...

    def mark(self) -> Callable[[], None]:
        """Returns what lets the steps' queue wait for all that this queue has so far."""
        ...

    def stopwatch(self) -> Callable[[], Callable[[], float | None]]:
        """Started now; call it to stop it, and then ask for the seconds that what was queued in
        between took: None as long as it is not done."""
        ...


class DeviceCopyQueue:
    """A CopyQueue of a device that runs ahead of the host."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._torch: Any = torch.get_device_module(device)
        self._stream = self._torch.Stream(device)

    def follow(self) -> None:
        self._stream.wait_stream(self._torch.current_stream(self._device))

    def used(self) -> AbstractContextManager[None]:
        queue: AbstractContextManager[None] = self._torch.stream(self._stream)
        return queue

    def mark(self) -> Callable[[], None]:
        event = self._torch.Event()
        event.record(self._stream)
        return lambda: self._torch.current_stream(self._device).wait_event(event)

    def stopwatch(self) -> Callable[[], Callable[[], float | None]]:
        start = self._instant()

        def stop() -> Callable[[], float | None]:
            end = self._instant()
            return lambda: start.elapsed_time(end) / 1e3 if end.query() else None

        return stop

    def _instant(self) -> Any:
        event = self._torch.Event(enable_timing=True)
        event.record(self._stream)
        return event


def copy_queue(device: torch.device) -> CopyQueue | None:
    """None: the device has no queues, as a CPU."""
    return DeviceCopyQueue(device) if runs_ahead(device) else None


def download(tensor: Tensor) -> Download:
    """Queue a copy to the host of the numbers that `tensor` has after all earlier work."""
    if not runs_ahead(tensor.device):
        return Here(tensor.cpu())
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    event = torch.get_device_module(tensor.device).Event()
    event.record()
    return _Arriving(host, event)


def upload(arrays: Sequence[NDArray[Any]], device: torch.device) -> list[Tensor]:
    """The arrays as tensors on the device, all of them brought by one copy.

    On a CPU they share the arrays' memory."""
    if device.type == "cpu":
        return [torch.from_numpy(array) for array in arrays]
    staged = torch.empty(packed_bytes(arrays), dtype=torch.uint8, pin_memory=runs_ahead(device))
    pack(arrays, staged.numpy())
    return unpack(staged.to(device, non_blocking=True), arrays)


def upload_one(values: Sequence[float] | NDArray[Any], dtype: Any, device: torch.device) -> Tensor:
    """Numbers as a tensor of numpy's `dtype` on the device."""
    return upload([np.asarray(values, dtype=dtype)], device)[0]


def packed_bytes(arrays: Sequence[NDArray[Any]]) -> int:
    """Bytes of the arrays one after the other, each aligned."""
    return sum(_aligned(array.nbytes) for array in arrays)


def pack(arrays: Sequence[NDArray[Any]], target: NDArray[np.uint8]) -> None:
    """Write the arrays one after the other into target [packed_bytes(arrays)]."""
    start = 0
    for array in arrays:
        target[start : start + array.nbytes] = (
            np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        )
        start += _aligned(array.nbytes)


def unpack(packed: Tensor, like: Sequence[NDArray[Any]]) -> list[Tensor]:
    """Views of packed [packed_bytes(like)] uint8 with the dtypes and shapes of `like`."""
    views = []
    start = 0
    for array in like:
        dtype = torch.from_numpy(np.empty(0, dtype=array.dtype)).dtype
        views.append(packed[start : start + array.nbytes].view(dtype).view(array.shape))
        start += _aligned(array.nbytes)
    return views


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGNMENT) * _ALIGNMENT
