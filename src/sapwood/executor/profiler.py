"""Recordings of torch's profiler, in the trace format of Chrome and Perfetto."""

from __future__ import annotations

from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from sapwood.observe.profiling import ProfileOrder


class TorchRecorder:
    """Implements `observe.profiling.Recorder`.

    Steps may run in another thread than the one that starts and stops the recording, so all threads
    are recorded.
    """

    def __init__(self) -> None:
        self._profile: profile | None = None

    def start(self, order: ProfileOrder) -> None:
        recording = profile(
            activities=_activities(order),
            record_shapes=order.record_shapes,
            with_stack=order.with_stack,
            experimental_config=torch._C._profiler._ExperimentalConfig(profile_all_threads=True),
        )
        try:
            recording.start()
        except RuntimeError as error:  # this process runs another profiler already
            raise OSError(f"torch's profiler does not start: {error}") from error
        self._profile = recording

    def stop(self, path: Path) -> None:
        recording, self._profile = self._profile, None
        assert recording is not None, "nothing is being recorded"
        recording.stop()
        recording.export_chrome_trace(str(path))


def _activities(order: ProfileOrder) -> list[ProfilerActivity]:
    """Torch's names of the activities. Most clients ask for GPU, which is left out without one."""
    chosen = [ProfilerActivity.CPU] if "CPU" in order.activities else []
    if "GPU" in order.activities and torch.cuda.is_available():
        chosen.append(ProfilerActivity.CUDA)
    return chosen or [ProfilerActivity.CPU]
