"""Targets: what a layer declares about each tensor that it wants from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar

from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.coded import LinearPart
from sapwood.layers.adapted_vocab import VocabTarget
from sapwood.layers.adapters import AdapterTarget


@dataclass(frozen=True, slots=True, kw_only=True)
class Slice:
    """The part of a whole tensor that one rank places: `first` .. first + size of a dimension.

    dim  0: rows, which lie together in a file; 1: columns
    """

    dim: int
    first: int
    size: int

    @staticmethod
    def unless_whole(dim: int, first: int, size: int, whole_size: int) -> Slice | None:
        """None if the part is the whole dimension."""
        return None if size == whole_size else Slice(dim=dim, first=first, size=size)

    def of(self, whole: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.first, self.size)

    def of_blocks(self, whole: LinearPart) -> LinearPart:
        """The same part of a quantised weight; ConfigError if it would cut a block."""
        cut = whole.columns if self.dim else whole.rows
        try:
            return cut(self.first, self.size)
        except ValueError as error:
            raise ConfigError(
                f"a weight {list(whole.shape)} cannot be split over the ranks: {error}; choose a "
                "smaller --tp-size, or leave out --quantization"
            ) from error


@dataclass(frozen=True, slots=True, kw_only=True)
class FusedIn:
    """Where an expert's tensor is in a checkpoint with one tensor [experts, outputs, …] for all.

    name         of that tensor
    expert       the expert, of num_experts
    part         which of the num_parts layers whose outputs that tensor has
    takes_turns  whether their outputs take turns; if not, one part comes after the other
    transposed   whether a weight is [experts, inputs, outputs] there
    """

    name: str
    expert: int
    num_experts: int
    part: int = 0
    num_parts: int = 1
    takes_turns: bool = False
    transposed: bool = False


class FusedLayer(Protocol):
    """A layer that keeps the tensors of several layers of the checkpoint in one weight."""

    @property
    def keeps_parts(self) -> bool:
        """Whether some of the tensors may be filled again, and the others stay."""
        ...


@dataclass(frozen=True, slots=True)
class Target:
    """One tensor that a layer wants from the checkpoint. It can be filled again: see Linear.

    shape  shape of the whole tensor in the checkpoint
    put    takes this rank's part and copies it to its place, converting dtype and device
    put_blocks  takes the same part in the checkpoint's quantised form; None: the tensor must be
           dequantised and given to `put`
    takes_integers  whether the tensor belongs to a quantised weight, whose integers or 8-bit floats
           are taken unchanged. Other targets refuse such tensors: a cast would change the numbers
    part   this rank's part, so that a loader can read that alone; None: the whole tensor
    is_rearranged  whether the layer's rows lie in another order than the tensor's, or in several
           parts
    has_rows  whether the tensor's rows are outputs of one layer. If not, a conversion, which keeps
           the checkpoint's names and its rows, cannot write the tensor anew
    fused_in  the tensor as which a checkpoint may have this one, together with others; None: there
           is none such
    adapter  where adapters of this weight add; None: there are no adapters, or none of this tensor
    vocab_adapter  the same for an embedding, and for a whole weight in this one's place
    is_elsewhere  whether other ranks have the tensor, so that this rank need not read it
    of_expert  whether the tensor is one of an expert that a router chooses
    fused_with  the layer that keeps the tensor beside others in one weight; None: it lies alone
    is_beside  whether `put` leaves the numbers alone with which the layer computes, until its
           model's Renewal changes them
    read   the values of this rank's part as they are now, or None where kernels keep them in
           another form; None: they cannot be read back
    """

    shape: tuple[int, ...]
    put: Callable[[Tensor], None]
    put_blocks: Callable[[LinearPart], None] | None = None
    takes_integers: bool = False
    part: Slice | None = None
    is_rearranged: bool = False
    has_rows: bool = True
    fused_in: FusedIn | None = None
    adapter: AdapterTarget | None = None
    vocab_adapter: VocabTarget | None = None
    is_elsewhere: bool = False
    of_expert: bool = False
    fused_with: FusedLayer | None = None
    is_beside: bool = False
    read: Callable[[], Tensor | None] | None = None

    @property
    def part_shape(self) -> tuple[int, ...]:
        """Shape of this rank's part."""
        if self.part is None:
            return self.shape
        sizes = list(self.shape)
        sizes[self.part.dim] = self.part.size
        return tuple(sizes)

    def place(self, whole: Tensor) -> None:
        """Put this rank's part of the whole tensor."""
        self.put(whole if self.part is None else self.part.of(whole))

    def place_blocks(self, whole: LinearPart) -> None:
        """Put this rank's part of the whole quantised weight, only if there is a `put_blocks`.

        Raises ConfigError if the part would cut a block."""
        assert self.put_blocks is not None
        self.put_blocks(whole if self.part is None else self.part.of_blocks(whole))


W = TypeVar("W")


def prefixed(prefix: str, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The same targets under `prefix.name`; under their own names if the prefix is empty."""
    if not prefix:
        return dict(targets)
    return {f"{prefix}.{name}": _under(prefix, target) for name, target in targets.items()}


def _under(prefix: str, target: Target) -> Target:
    fused = target.fused_in
    if fused is None:
        return target
    return replace(target, fused_in=replace(fused, name=f"{prefix}.{fused.name}"))


def whole(parameter: Tensor) -> Target:
    """A tensor that every rank holds in full."""

    def put(tensor: Tensor) -> None:
        parameter.copy_(tensor)

    return Target(tuple(parameter.shape), put, read=lambda: parameter)


def unused(shape: tuple[int, ...]) -> Target:
    """A tensor that this rank does not need, but whose absence would be an error."""
    return Target(shape, lambda _: None, lambda _: None)


def elsewhere(shape: tuple[int, ...]) -> Target:
    """A tensor that other ranks have: nothing happens if it comes, and nothing if it does not."""
    return replace(unused(shape), is_elsewhere=True)


def into_all(targets: Sequence[Target]) -> Target:
    """One tensor that several layers take whole, or the same part of it."""
    if len(targets) == 1:
        return targets[0]

    def put(tensor: Tensor) -> None:
        for target in targets:
            target.put(tensor)

    def put_blocks(part: LinearPart) -> None:
        for target in targets:
            assert target.put_blocks is not None
            target.put_blocks(part)

    takes_blocks = all(target.put_blocks is not None for target in targets)
    is_beside = all(target.is_beside for target in targets)
    blocks = put_blocks if takes_blocks else None
    return replace(targets[0], put=put, put_blocks=blocks, is_beside=is_beside)


def shared_by(first: Target, second: Target) -> Target:
    """One tensor, of whose rows two layers take some each, and each row has one taker."""

    def put(tensor: Tensor) -> None:
        first.put(tensor)
        second.put(tensor)

    def put_blocks(part: LinearPart) -> None:
        for target in (first, second):
            assert target.put_blocks is not None
            target.put_blocks(part)

    takes_blocks = first.put_blocks is not None and second.put_blocks is not None
    shape = (first.shape[0] + second.shape[0], *first.shape[1:])
    return Target(shape, put, put_blocks if takes_blocks else None, is_rearranged=True)


def once_filled(targets: Mapping[str, Target], done: Callable[[], None]) -> dict[str, Target]:
    """The same targets; `done` is called as soon as every target has got its tensor."""
    waiting = set(targets)

    def noting(name: str, put: Callable[[W], None]) -> Callable[[W], None]:
        def put_and_note(tensor: W) -> None:
            put(tensor)
            waiting.discard(name)
            if not waiting:
                done()

        return put_and_note

    return {
        name: replace(
            target,
            put=noting(name, target.put),
            put_blocks=target.put_blocks and noting(name, target.put_blocks),
        )
        for name, target in targets.items()
    }
