"""What a tower is to the rest of the program."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.targets import Target
from sapwood.schema.media import Medium


class Tower(Protocol):
    """Makes vectors of pictures and videos. It is constructed, filled and finalized as a decoder.

    hf_config  the whole model's config.json
    """

    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None: ...

    attends_both_ways: bool
    """Whether tokens of a picture see one another in the decoder, later ones too."""

    over_ranks: bool
    """Whether several ranks may share the decoder; each of them has the whole tower."""

    @property
    def vector_size(self) -> int:
        """Numbers of the vector of one token, those for later layers included."""
        ...

    def why_unfit(self, medium: Medium) -> str | None:
        """Why a request with that medium is refused; None if it is not. Nothing else is asked about
        a medium before."""
        ...

    def num_patches(self, medium: Medium) -> int:
        """What the tower has to compute for it."""
        ...

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        """Of each medium: [its tokens, vector_size]"""
        ...

    @property
    def axis_of_pair(self) -> Tensor | None:
        """By pair of a head's entries that the decoder rotates: which of a token's positions in
        time, height and width turns it. None: a token has one position, its index."""
        ...

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        """The positions [3, num_tokens] of a prompt; None: each is a token's index.

        media  need not have their pixels"""
        ...

    def targets(self) -> dict[str, Target]: ...

    def ignorable_tensors(self) -> tuple[str, ...]: ...

    def checkpoint_name(self, name: str) -> str:
        """The name in `targets()` of a checkpoint's tensor, if it is the tower's."""
        ...

    def finalize(self) -> None: ...


@runtime_checkable
class AttendedTower(Protocol):
    """A tower whose vectors take no token's place: the decoder's layers attend to them across.

    num_across  vectors of each medium
    """

    num_across: int
