"""How a router chooses the experts of a token, as data: one op computes every rule."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Scores(StrEnum):
    """What logits of a router become.

    SOFTMAX      a softmax over all experts (Shazeer et al. 2017, arXiv:1701.06538). Divided by
                 their sum, the scores of the chosen experts are the softmax of these alone.
    SIGMOID      of each logit (DeepSeek-AI 2024, arXiv:2412.19437)
    SPARSEMIXER  two experts, chosen one after the other, the second among the others. The weight of
                 each is its softmax among the experts whose logits are near the largest: at most
                 2 * `jitter` below, relative to the larger of the largest logit and the size of the
                 expert's own (Liu et al. 2024, arXiv:2409.12136).
    """

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SPARSEMIXER = "sparsemixer"


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """A rule that chooses experts by their scores, the largest first; of equal ones, the first.

    num_chosen     experts of each token
    renormalise    whether the weights of a token's experts are divided by their sum
    least_sum      what a smaller sum counts as
    scale          factor of all weights
    num_groups     groups of equally many experts that lie together; a token's experts come from
                   the num_groups_chosen groups with the best scores
    group_best     how many of its best experts' scores add up to a group's score
    jitter         of SPARSEMIXER

    A correction bias [experts], which some routers have, is added to the scores by which experts
    and groups are chosen; the weights are scores without it.

    Raises ValueError for numbers that do not fit each other."""

    num_chosen: int
    scores: Scores = Scores.SOFTMAX
    renormalise: bool = False
    least_sum: float = 0.0
    scale: float = 1.0
    num_groups: int = 1
    num_groups_chosen: int = 1
    group_best: int = 1
    jitter: float = 0.0

    def __post_init__(self) -> None:
        if self.num_chosen < 1:
            raise ValueError(f"k is {self.num_chosen}, but a token needs an expert")
        if not 1 <= self.num_groups_chosen <= self.num_groups:
            raise ValueError(
                f"{self.num_groups_chosen} of {self.num_groups} groups of experts cannot be chosen"
            )
        if self.scores is Scores.SPARSEMIXER and (self.num_chosen, self.num_groups) != (2, 1):
            raise ValueError("sparsemixer chooses two experts, without groups")

    def check(self, num_experts: int) -> None:
        """ValueError if the rule does not fit that many experts."""
        if num_experts % self.num_groups or self.group_best > num_experts // self.num_groups:
            raise ValueError(
                f"{num_experts} experts do not make {self.num_groups} groups of which the best "
                f"{self.group_best} count"
            )
        available = num_experts // self.num_groups * self.num_groups_chosen
        if self.num_chosen > available:
            raise ValueError(
                f"k is {self.num_chosen}, but there are {available} experts to choose from"
            )
