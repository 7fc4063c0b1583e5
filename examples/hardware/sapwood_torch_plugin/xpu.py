"""Intel's GPUs, which torch calls xpu."""

from __future__ import annotations

from datetime import timedelta

from torch.distributed import ProcessGroup, Store

from sapwood.kernels.accelerators import TorchAccelerator


class XpuAccelerator(TorchAccelerator):
    """Queues and memory are torch's; ranks speak oneCCL where torch was built with it."""

    kind = "xpu"
    title = "XPU"

    def why_none(self) -> str:
        return "finds no XPU; install a build of torch for XPUs, and see whether sycl-ls lists one"

    def process_group(self, store: Store, rank: int, size: int, timeout: timedelta) -> ProcessGroup:
        from torch.distributed import ProcessGroupXCCL  # only in builds for XPUs

        return ProcessGroupXCCL(store, rank, size)


XPU = XpuAccelerator()
