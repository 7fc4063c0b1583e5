"""Kinds of devices beside the CPU: how to find them, their memory, their queues and captures.

sapwood brings CUDA (and so ROCm, which torch calls cuda, too). Another package adds a kind by an
entry point of the group `sapwood.accelerators` whose name is torch's device type; the kernels that
compute there are an entry point of `sapwood.kernels` (docs/hardware.md).
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
from torch._C._distributed_c10d import ProcessGroup, Store

from sapwood.base.registry import Registry
from sapwood.kernels.capture import Capture, CudaCapture
from sapwood.kernels.recording import CannotRecord


class DeviceMemory(Protocol):
    """The memory of a device."""

    device: torch.device

    def free_and_total(self) -> tuple[int, int]:
        """(free, total) bytes; free memory is used by no program, nor cached by this one."""
        ...

    def peak_bytes_of(self, run: Callable[[], None]) -> int:
        """Call `run`. Returns the bytes that it used at its peak, beside those in use before."""
        ...


class Accelerator(Protocol):
    """A kind of device that queues its work. Streams and events are those of torch's module of the
    kind (`torch.get_device_module`), which every kind must have.

    title  as people write it
    """

    title: str

    def names(self) -> tuple[str, ...]:
        """The name of each device of this kind that this process may use; empty: there is none."""
        ...

    def why_none(self) -> str:
        """What is missing where there is none, and the way out, after "torch x.y"."""
        ...

    def memory(self, device: torch.device) -> DeviceMemory: ...

    def allocated_bytes(self) -> int:
        """Memory that this process's tensors have on devices of this kind."""
        ...

    def capture(self, device: torch.device) -> Capture:
        """A way to capture steps; raises CannotRecord if the device has none."""
        ...

    def process_group(self, store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
        """Collectives among ranks that have a device of this kind each."""
        ...


class TorchMemory:
    """The memory of a device as torch's allocator for its kind sees it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._torch: Any = torch.get_device_module(device)

    def free_and_total(self) -> tuple[int, int]:
        self._torch.empty_cache()
        return cast(tuple[int, int], self._torch.mem_get_info(self.device))

    def peak_bytes_of(self, run: Callable[[], None]) -> int:
        self._torch.synchronize(self.device)
        before = self._torch.memory_allocated(self.device)
        self._torch.reset_peak_memory_stats(self.device)
        run()
        self._torch.synchronize(self.device)
        peak: int = self._torch.max_memory_allocated(self.device)
        return peak - int(before)


class TorchAccelerator:
    """What every kind can do through torch's module of it; a base for packages that add one.

    kind  torch's device type
    """

    kind: str
    title: str

    def names(self) -> tuple[str, ...]:
        module = torch.get_device_module(self.kind)
        return tuple(module.get_device_name(index) for index in range(module.device_count()))

    def why_none(self) -> str:
        return f"finds no {self.title} device; see whether its driver does"

    def memory(self, device: torch.device) -> DeviceMemory:
        return TorchMemory(device)

    def allocated_bytes(self) -> int:
        module = torch.get_device_module(self.kind)
        return int(module.memory_allocated()) if module.is_available() else 0

    def capture(self, device: torch.device) -> Capture:
        raise CannotRecord(f"a {device.type} device captures nothing")

    def process_group(self, store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
        raise NotImplementedError(f"ranks on {self.title} devices have no collectives here")


class CudaAccelerator(TorchAccelerator):
    kind = "cuda"
    title = "CUDA"

    def why_none(self) -> str:
        if torch.version.cuda is None and torch.version.hip is None:
            return (
                "is built without CUDA; install a build with it "
                "(https://pytorch.org/get-started/locally)"
            )
        return (
            "finds no CUDA device; see whether nvidia-smi does, and what CUDA_VISIBLE_DEVICES says"
        )

    def capture(self, device: torch.device) -> Capture:
        return CudaCapture(device)

    def process_group(self, store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
        # Not every build of torch has it.
        from torch._C._distributed_c10d import ProcessGroupNCCL

        options = ProcessGroupNCCL.Options()
        options._timeout = timeout
        return cast(ProcessGroup, ProcessGroupNCCL(store, rank, size, options))


CUDA = CudaAccelerator()

ACCELERATORS: Registry[Accelerator] = Registry(
    "accelerator",
    {"cuda": "sapwood.kernels.accelerators:CUDA"},
    entry_point="sapwood.accelerators",
)


def accelerator_of(device: torch.device) -> Accelerator | None:
    """The kind of a device; None for a CPU, and for what nobody has added."""
    return ACCELERATORS.get(device.type) if device.type in ACCELERATORS.names() else None


def best_accelerator() -> str | None:
    """The device type of the first kind, CUDA before others, that has a device here."""
    names = sorted(ACCELERATORS.names(), key=lambda name: (name != "cuda", name))
    return next((name for name in names if ACCELERATORS.get(name).names()), None)


def memory_of(device: torch.device) -> DeviceMemory:
    """The memory of an accelerator's device; ConfigError for another device."""
    return ACCELERATORS.get(device.type).memory(device)


def capture_on(device: torch.device) -> Capture:
    """A way to capture steps on the device; raises CannotRecord if the device has none."""
    accelerator = accelerator_of(device)
    if accelerator is None:
        raise CannotRecord(f"a {device.type} device captures nothing")
    return accelerator.capture(device)
