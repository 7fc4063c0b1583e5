"""What towers have in common whose vectors stand in a prompt as tokens do, one position each."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from sapwood.layers.build import Build
from sapwood.layers.targets import Target
from sapwood.models.vision.tiles import TileForm
from sapwood.schema.media import Medium


class PlainTower(ABC):
    """All of `Tower` but what it computes."""

    vector_size: int
    attends_both_ways = False
    over_ranks = True

    @abstractmethod
    def __init__(self, hf_config: Mapping[str, Any], build: Build) -> None: ...

    @abstractmethod
    def why_unfit(self, medium: Medium) -> str | None: ...

    @abstractmethod
    def num_patches(self, medium: Medium) -> int: ...

    @abstractmethod
    def encode(self, media: Sequence[Medium]) -> list[Tensor]: ...

    @abstractmethod
    def targets(self) -> dict[str, Target]: ...

    @property
    def axis_of_pair(self) -> Tensor | None:
        return None

    def positions(self, num_tokens: int, media: Sequence[Medium]) -> NDArray[np.int64] | None:
        return None

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()

    def checkpoint_name(self, name: str) -> str:
        return name.removeprefix("model.")

    def finalize(self) -> None:
        """Each layer is packed once it is filled."""
        return


class TileTower(PlainTower):
    """Pictures are rows of tiles of one size; each tile becomes equally many vectors."""

    form: TileForm
    tokens_per_tile: int

    def why_unfit(self, medium: Medium) -> str | None:
        return self.form.why_unfit(medium, self.tokens_per_tile)

    def num_patches(self, medium: Medium) -> int:
        return self.form.num_patches(medium)

    def encode(self, media: Sequence[Medium]) -> list[Tensor]:
        vectors = self.vectors(media)
        return list(vectors.split_with_sizes([medium.num_tokens for medium in media]))

    @abstractmethod
    def vectors(self, media: Sequence[Medium]) -> Tensor:
        """[tokens of all media, vector_size]"""
