"""A capture without a GPU: it notes every op with its operands, and does them again on a replay.

As on a GPU, tensors stay where they are, and a number that the host computed is repeated as it was.
An op whose result the host looks at cannot be recorded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

_LOOKED_AT = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.item.default,
    torch.ops.aten.nonzero.default,
}


class HostLooked(RuntimeError):
    """A GPU refuses this too."""


@dataclass
class Note:
    op: Callable[..., Any]
    args: tuple[Any, ...]
    named: dict[str, Any]
    result: Any

    def repeat(self) -> None:
        again = self.op(*self.args, **self.named)
        operands = {
            _memory(one) for one in tree_leaves((self.args, self.named)) if _has_memory(one)
        }
        for new, old in zip(tree_leaves(again), tree_leaves(self.result), strict=True):
            # A view, or what was written in place, is where it was.
            if _has_memory(old) and _memory(old) not in operands:
                old.copy_(new)


def _has_memory(value: Any) -> bool:
    return isinstance(value, Tensor) and value.layout == torch.strided and value.numel() > 0


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@dataclass
class Recording:
    notes: list[Note] = field(default_factory=list)
    num_replays: int = 0

    @torch.inference_mode()
    def replay(self) -> None:
        self.num_replays += 1
        for note in self.notes:
            note.repeat()


class _Listener(TorchDispatchMode):
    def __init__(self, recording: Recording) -> None:
        super().__init__()
        self._recording = recording

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _LOOKED_AT:
            raise HostLooked(f"{func} was asked for during a capture")
        result = func(*args, **(kwargs or {}))
        self._recording.notes.append(Note(func, args, kwargs or {}, result))
        return result


class RecordingCapture:
    def __init__(self) -> None:
        self._listener: _Listener | None = None
        self._recording: Recording | None = None
        self.recordings: list[Recording] = []

    @property
    def is_open(self) -> bool:
        return self._listener is not None

    def noted(self, kernel: Any) -> Any:
        """A Triton kernel whose launches are recorded, too."""
        return _NotedKernel(kernel, self)

    def note(self, launch: Callable[[], None]) -> None:
        """Do it now, and with each replay if a capture is open."""
        with _disable_current_modes():  # what the interpreter does beside it is no work of a device
            launch()
        if self.is_open:
            assert self._recording is not None
            self._recording.notes.append(Note(launch, (), {}, None))

    def begin(self) -> None:
        assert self._listener is None, "one capture at a time"
        self._recording = Recording()
        self._listener = _Listener(self._recording)
        self._listener.__enter__()

    def end(self) -> Recording:
        assert self._listener is not None
        assert self._recording is not None
        self._listener.__exit__(None, None, None)
        self._listener = None
        self.recordings.append(self._recording)
        return self._recording


@dataclass
class _NotedKernel:
    kernel: Any
    recorder: RecordingCapture

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **named: Any) -> None:
            self.recorder.note(lambda: self.kernel[grid](*args, **named))

        return launch
