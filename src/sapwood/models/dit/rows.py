"""What a diffusion transformer is given of each picture, and what it gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.layers.targets import Target


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DenoisingRow:
    """One picture, or one pass of guidance over it. Rows of a step may differ in everything.

    latents    [S, channels]: a vector per patch of the picture, and of pictures to look at
    text       [L, text size]: the vectors of the prompt
    rotations  of the tokens, as the transformer's `rotations` gave them; the vectors of `positions`
               for a transformer that adds them
    timestep   from 1000, all noise, to 0
    pooled     [size]: the vector of the whole prompt; None: the transformer wants none
    guidance   strength of guidance as an input of the transformer; None: it has no such input
    num_wanted  tokens whose prediction is wanted: the first ones; None: all
    """

    latents: Tensor
    text: Tensor
    rotations: Tensor
    timestep: float
    pooled: Tensor | None = None
    guidance: float | None = None
    num_wanted: int | None = None

    @property
    def num_tokens(self) -> int:
        return len(self.latents) + len(self.text)


class DiffusionTransformer(Protocol):
    """A model that predicts what is to be taken from noisy latents.

    It is constructed without weights, filled (`targets`, as models/loader/assign does) and called
    under torch.inference_mode()."""

    def __call__(self, rows: Sequence[DenoisingRow]) -> list[Tensor]:
        """Per row [num_wanted, channels], in the model's dtype."""
        ...

    def targets(self) -> Mapping[str, Target]: ...

    def ignorable_tensors(self) -> Sequence[str]: ...


def column(numbers: Sequence[float], device: torch.device) -> Tensor:
    """Numbers of the rows as [R] fp32"""
    return torch.tensor(list(numbers), dtype=torch.float32, device=device)
