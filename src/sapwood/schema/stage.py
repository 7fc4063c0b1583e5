"""Which layers of a model a rank has, if ranks share the layers out (pipeline parallelism)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from sapwood.base.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One of `count` stages, through which every token goes in their order.

    The first one has the embedding; the last one has the final norm and the output layer, and
    chooses tokens.

    layers  indices of the stage's layers; at least one
    """

    index: int
    count: int
    layers: range

    def __post_init__(self) -> None:
        if not 0 <= self.index < self.count or not self.layers:
            raise ValueError(f"{self} is no stage of a model")

    @property
    def is_first(self) -> bool:
        return self.index == 0

    @property
    def is_last(self) -> bool:
        return self.index == self.count - 1


def whole_model(num_layers: int) -> Stage:
    """The one stage of a model whose layers are all on the same ranks."""
    return Stage(index=0, count=1, layers=range(num_layers))


def stages_of(num_layers: int, count: int, sizes: Sequence[int] | None = None) -> tuple[Stage, ...]:
    """All stages of a model, the first one first.

    sizes   layers of each; None: as even as possible. The first stages get what is left over, since
            the last one has the output layer besides
    Raises  ConfigError if there are more stages than layers, or `sizes` are those of another model
    """
    if sizes is None:
        if count > num_layers:
            raise ConfigError(
                f"--pp-size is {count}, but the model has {num_layers} layers, and each stage "
                f"needs one; use --pp-size {num_layers} or less"
            )
        sizes = [num_layers // count + (index < num_layers % count) for index in range(count)]
    if sum(sizes) != num_layers:
        raise ConfigError(
            f"--pp-layer-partition {','.join(map(str, sizes))} is for {sum(sizes)} layers, but the "
            f"model has {num_layers}"
        )
    ends = [sum(sizes[: index + 1]) for index in range(count)]
    return tuple(
        Stage(index=index, count=count, layers=range(end - sizes[index], end))
        for index, end in enumerate(ends)
    )
