"""Takes guesses that a model finds likely enough, whether or not it would have chosen them.

This changes the distribution of outputs, on purpose, if a threshold is below 1. With both at 1 the
tokens are distributed as the model's, but are not those that are sampled without guesses; so then
`spans` compares guesses with the sampled tokens instead, and nothing here is used.

Source: the rule by which SGLang samples from the target model only, with its two thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.torch_ops.sampling import inverse_cdf, kept_probabilities
from sapwood.kernels.transfer import upload_one

_REJECTED = -1


@dataclass(frozen=True, slots=True, kw_only=True)
class AcceptThresholds:
    """When a guess is taken; both above 0 and at most 1.

    single       if the guess has at least this probability
    accumulated  if the number that was drawn is below the probability of the guesses tried so far
                 in this place, divided by this threshold
    """

    single: float = 1.0
    accumulated: float = 1.0

    def choose(
        self, logits: Tensor, guesses: Sequence[Sequence[int]], settings: SamplingSettings
    ) -> Tensor:
        """One token per row: the first of the row's guesses that is taken, else a token at random,
        from the model's distribution without the guesses. Waits for the device.

        logits    [S, vocab]
        guesses   different tokens of each row, at least one, in the order in which they are tried
        settings  the probabilities are those that its filters keep; its numbers decide
        Returns   [S] int64, on the logits' device
        """
        probs = kept_probabilities(logits, settings)
        num_kept = (probs > 0).sum(dim=-1).tolist()
        chosen, numbers = list[int](), list[float]()
        for row, likely in enumerate(_probabilities_of(probs, guesses)):
            number = settings.numbers[row]
            bounds = [tried / self.accumulated for tried in accumulate(likely)]
            possible = [place for place, prob in enumerate(likely) if prob > 0]
            taken = [p for p in possible if likely[p] >= self.single or number < bounds[p]]
            if not taken and 0 < len(possible) == num_kept[row]:
                # Rounding left a gap above the sum: there is no other token.
                taken = possible[-1:]
            chosen.append(guesses[row][taken[0]] if taken else _REJECTED)
            # Above the last bound all numbers are equally likely, so that one number is enough.
            numbers.append(0.0 if taken else (number - bounds[-1]) / (1.0 - bounds[-1]))
        rejected = [row for row, token_id in enumerate(chosen) if token_id == _REJECTED]
        tokens_chosen = upload_one(chosen, np.int64, logits.device)
        if rejected:
            at = upload_one(rejected, np.int64, logits.device)
            left = probs.index_select(0, at)
            vocab = left.shape[-1]
            for place, row in enumerate(rejected):
                left[place, [token for token in guesses[row] if token < vocab]] = 0.0
            drawn = upload_one([numbers[row] for row in rejected], np.float64, logits.device)
            tokens_chosen.index_copy_(0, at, inverse_cdf(left, drawn))
        return tokens_chosen


def _probabilities_of(probs: Tensor, guesses: Sequence[Sequence[int]]) -> list[list[float]]:
    """probs [S, vocab] -> those of each row's guesses; 0 for a draft model's token that the model
    does not have."""
    vocab = probs.shape[-1]
    flat = [
        row * vocab + token if token < vocab else -1
        for row, tokens in enumerate(guesses)
        for token in tokens
    ]
    at = upload_one(flat, np.int64, probs.device)
    found = torch.where(at < 0, 0.0, probs.flatten()[at.clamp(min=0)]).tolist()
    values = iter(found)
    return [[next(values) for _ in tokens] for tokens in guesses]
