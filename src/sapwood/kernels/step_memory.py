"""Where the buffers of a program lie."""

from __future__ import annotations

from collections.abc import Sequence

from sapwood.kernels.recording import Op, buffers_of, written_by
from sapwood.kernels.recording_buffers import Buffer


def plan_memory(ops: Sequence[Op]) -> tuple[list[int], dict[Buffer, int]]:
    """(widths of places, the place of each buffer): buffers that are needed at the same time never
    share a place, and those that are not may."""
    last_use = {buffer: index for index, op in enumerate(ops) for _, buffer in buffers_of(op)}
    widths: list[int] = []
    free: list[int] = []
    places: dict[Buffer, int] = {}
    for index, op in enumerate(ops):
        for buffer in written_by(op):
            if buffer in places:
                continue
            # The narrowest that is wide enough, else the widest, which grows.
            fitting = [place for place in free if widths[place] >= buffer.width]
            chosen = min(fitting, key=widths.__getitem__, default=None)
            if chosen is None:
                chosen = max(free, key=widths.__getitem__, default=None)
            if chosen is None:
                chosen = len(widths)
                widths.append(0)
            else:
                free.remove(chosen)
            widths[chosen] = max(widths[chosen], buffer.width)
            places[buffer] = chosen
        free += {
            places[buffer] for _, buffer in buffers_of(op) if last_use[buffer] == index
        }  # the op's own: none of its buffers may be where another is
    return widths, places
