"""Makes what guesses tokens, as the configuration asks."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.base.clock import Clock
from sapwood.engine.speculation import Speculation
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.speculation import SpeculationConfig
from sapwood.speculative.costs import StepCosts
from sapwood.speculative.ngram import NgramDrafter, NgramRules


def build_speculation(
    config: SpeculationConfig, ledger: Ledger, clock: Clock, measured_s: Mapping[int, float]
) -> Speculation | None:
    """None if nothing is to be guessed.

    measured_s  seconds of a step of one request, by its new tokens
    """
    if config.speculative_algorithm is None:
        return None
    rules = NgramRules(
        least_match=config.speculative_ngram_min_match_window_size,
        most_match=config.speculative_ngram_max_match_window_size,
        branch_length=config.speculative_ngram_branch_length,
        by_frequency=config.speculative_ngram_match_type == "PROB",
    )
    return Speculation(
        NgramDrafter(rules, capacity=config.speculative_ngram_capacity),
        ledger,
        most_drafts=config.speculative_num_draft_tokens - 1,
        most_step_tokens=config.speculative_max_step_tokens,
        clock=clock,
        costs=StepCosts(measured_s) if config.adapts else None,
    )
