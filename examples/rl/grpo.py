"""Group relative policy optimisation: an answer is good if it is better than its group's mean.

Source: Shao et al. 2024, arXiv:2402.03300; with one step per batch the ratio of policies is 1, so
that the loss is that of a policy gradient. No reference model: the runs are short.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sample:
    prompt_ids: list[int]
    output_ids: list[int]
    advantage: float


def advantages(rewards: Sequence[Sequence[float]]) -> list[list[float]]:
    """Per group: how many standard deviations each reward is above the mean; 0 if all are equal."""
    found: list[list[float]] = []
    for group in rewards:
        numbers = torch.tensor(group, dtype=torch.float64)
        spread = numbers.std(correction=0)
        found.append(((numbers - numbers.mean()) / (spread + 1e-4)).tolist())
    return found


def loss_of(model: torch.nn.Module, samples: Sequence[Sample]) -> Tensor:
    """Minus the mean, over all output tokens, of advantage times log probability.

    Equal samples are computed once, with the sum of their advantages."""
    summed: dict[tuple[tuple[int, ...], tuple[int, ...]], float] = {}
    for one in samples:
        key = tuple(one.prompt_ids), tuple(one.output_ids)
        summed[key] = summed.get(key, 0.0) + one.advantage
    longest = max(len(prompt) + len(output) for prompt, output in summed)
    ids = torch.zeros(len(summed), longest, dtype=torch.long)
    mask = torch.zeros(len(summed), longest, dtype=torch.long)
    weights = torch.zeros(len(summed), longest)
    for row, ((prompt, output), advantage) in enumerate(summed.items()):
        ids[row, : len(prompt) + len(output)] = torch.tensor(prompt + output)
        mask[row, : len(prompt) + len(output)] = 1
        weights[row, len(prompt) : len(prompt) + len(output)] = advantage
    # Only places before output tokens need logits, which are wide.
    first = min(len(prompt) for prompt, _ in summed) - 1
    logits = model(ids, attention_mask=mask, logits_to_keep=longest - first).logits
    log_probs = logits[:, :-1].float().log_softmax(-1)
    chosen = log_probs.gather(-1, ids[:, first + 1 :, None])[..., 0]
    num_tokens = sum(len(one.output_ids) for one in samples)
    return -(chosen * weights[:, first + 1 :]).sum() / num_tokens
