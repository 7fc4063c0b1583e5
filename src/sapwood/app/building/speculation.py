"""Makes what guesses tokens, as the configuration asks."""

from __future__ import annotations

from collections.abc import Mapping

from sapwood.base.clock import Clock
from sapwood.engine.speculation import Speculation
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.drafting import DEFAULT_STEPS, MODEL_ALGORITHMS
from sapwood.schema.config.engine import ResolvedConfig
from sapwood.schema.config.guessing import why_steps_wait
from sapwood.schema.config.speculation import SpeculationConfig
from sapwood.speculative.costs import StepCosts
from sapwood.speculative.ngram import NgramDrafter, NgramRules


def build_speculation(
    config: ResolvedConfig, ledger: Ledger, clock: Clock, measured_s: Mapping[int, float]
) -> Speculation | None:
    """None if nothing is to be guessed.

    measured_s  seconds of a step of one request, by its new tokens
    """
    asked = config.speculation
    algorithm = asked.speculative_algorithm
    if algorithm is None:
        return None
    asks_ranks = algorithm in MODEL_ALGORITHMS
    most_nodes = asked.speculative_num_draft_tokens - 1
    most_drafts, breadth = most_nodes, 1
    if asks_ranks:
        most_drafts = min(config.drafting.speculative_num_steps or DEFAULT_STEPS, most_nodes)
        breadth = config.drafting.speculative_eagle_topk
    why_not = why_steps_wait(asked, config.drafting, keeps_states=ledger.keeps_states)
    return Speculation(
        None if asks_ranks else _ngram_drafter(asked),
        ledger,
        most_drafts=most_drafts,
        most_nodes=most_nodes,
        breadth=breadth,
        most_step_tokens=asked.speculative_max_step_tokens,
        context_length=config.model.context_length,
        clock=clock,
        costs=StepCosts(measured_s) if asked.adapts else None,
        overlaps=config.scheduler.overlap_depth > 1 and why_not is None,
    )


def _ngram_drafter(asked: SpeculationConfig) -> NgramDrafter:
    rules = NgramRules(
        least_match=asked.speculative_ngram_min_match_window_size,
        most_match=asked.speculative_ngram_max_match_window_size,
        branch_length=asked.speculative_ngram_branch_length,
        by_frequency=asked.speculative_ngram_match_type == "PROB",
        least_breadth=asked.speculative_ngram_min_bfs_breadth,
        most_breadth=asked.speculative_ngram_max_bfs_breadth,
    )
    return NgramDrafter(rules, capacity=asked.speculative_ngram_capacity)
