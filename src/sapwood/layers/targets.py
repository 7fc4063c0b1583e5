"""Targets: what a layer declares about each tensor that it wants from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import Tensor

from sapwood.kernels.coded import LinearPart


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor that a layer wants from the checkpoint.

    shape  shape of the whole tensor in the checkpoint
    place  takes the whole tensor and copies this rank's part to its place, converting dtype and
           device
    place_blocks  takes the whole tensor in the checkpoint's quantised form; None: the tensor must
                  be dequantised and given to `place`
    takes_integers  whether the tensor belongs to a quantised weight, whose integers or 8-bit floats
           are taken unchanged. Other targets refuse such tensors: a cast would change the numbers
    """

    shape: tuple[int, ...]
    place: Callable[[Tensor], None]
    place_blocks: Callable[[LinearPart], None] | None = None
    takes_integers: bool = False


W = TypeVar("W")


def prefixed(prefix: str, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets under `prefix.name`."""
    return {f"{prefix}.{name}": target for name, target in targets.items()}


def whole(parameter: Tensor) -> Target:
    """A tensor that every rank holds in full."""

    def place(tensor: Tensor) -> None:
        parameter.copy_(tensor)

    return Target(tuple(parameter.shape), place)


def once_filled(targets: Mapping[str, Target], done: Callable[[], None]) -> dict[str, Target]:
    """The same targets; `done` is called as soon as every target has got its tensor."""
    waiting = set(targets)

    def noting(name: str, place: Callable[[W], None]) -> Callable[[W], None]:
        def place_and_note(tensor: W) -> None:
            place(tensor)
            waiting.discard(name)
            if not waiting:
                done()

        return place_and_note

    return {
        name: replace(
            target,
            place=noting(name, target.place),
            place_blocks=target.place_blocks and noting(name, target.place_blocks),
        )
        for name, target in targets.items()
    }
