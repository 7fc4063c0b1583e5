"""A device that works through its queue by itself: what it computed reaches the host later."""

from __future__ import annotations

import queue
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

LONGEST_DELAY_S = 2e-4


@dataclass(eq=False)
class Arriving:
    """`host` is nonsense until the worker has copied what the device had computed."""

    device: SimulatedDevice
    computed: Tensor
    host: Tensor
    done: threading.Event = field(default_factory=threading.Event)

    def wait(self) -> Tensor:
        self.device.count_wait()
        assert self.done.wait(10), "the simulated device is stuck"
        return self.host


class SimulatedDevice:
    """Torch computes at once, in the order of the launches, as a device's queue does; only copies
    to the host are late.

    waits_in_launch  how often a launch waited for tokens of steps before it
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self._queue: queue.SimpleQueue[Arriving | None] = queue.SimpleQueue()
        self._is_launching = False
        self.waits_in_launch = 0
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def download(self, tensor: Tensor) -> Arriving:
        # A copy: the device may overwrite the original for the next step.
        arriving = Arriving(self, tensor.clone(), torch.full_like(tensor, -1))
        self._queue.put(arriving)
        return arriving

    @contextmanager
    def launching(self) -> Iterator[None]:
        self._is_launching = True
        yield
        self._is_launching = False

    def count_wait(self) -> None:
        self.waits_in_launch += self._is_launching

    def close(self) -> None:
        self._queue.put(None)
        self._thread.join()

    def _work(self) -> None:
        torch.set_num_threads(1)
        while (arriving := self._queue.get()) is not None:
            if self._random.random() < 0.05:
                time.sleep(self._random.random() * LONGEST_DELAY_S)
            with torch.inference_mode():
                arriving.host.copy_(arriving.computed)
            arriving.done.set()
