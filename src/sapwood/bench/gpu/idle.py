"""Measures how much of the time a device does nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch.profiler import ProfilerActivity, profile

from sapwood.kernels.transfer import synchronize


def idle_share(intervals: Iterable[tuple[float, float]]) -> float:
    """The share of the time from the first start to the last end that no interval covers.

    intervals  (start, end) in any unit and order; they may overlap
    Raises     ValueError if there is no interval, or if all take no time
    """
    ordered = sorted(intervals)
    if not ordered:
        raise ValueError("nothing ran on the device, so it cannot be said how long it was idle")
    covered, reached = 0.0, ordered[0][0]
    for start, end in ordered:
        covered += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    whole = reached - ordered[0][0]
    if whole <= 0:
        raise ValueError("what ran on the device took no time")
    return 1.0 - covered / whole


def measure_idle(work: Callable[[], None], device: torch.device) -> float:
    """The share of `work`'s time in which no op ran on the device, by torch's profiler."""
    on_gpu = device.type == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        work()
        synchronize(device)
    kind = "CUDA" if on_gpu else "CPU"
    events = profiler.events() or []
    return idle_share(
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == kind
    )
