"""What the encoders of prompts give to a pipeline."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class PromptStates:
    """The states of B texts of L tokens.

    states  [B, L, size], of the layer that was asked for
    pooled  [B, size]: one vector per text; None: the encoder has none
    """

    states: Tensor
    pooled: Tensor | None
