"""What is decided about guesses of further tokens."""

from __future__ import annotations

from dataclasses import replace

from sapwood.schema.cache import CacheKind
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.drafting import MODEL_ALGORITHMS, DraftingConfig
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.facts import ModelFacts
from sapwood.schema.config.features import why_no_trees
from sapwood.schema.config.scheduler import ResolvedScheduler
from sapwood.schema.config.speculation import SpeculationConfig


def resolve_trees(
    asked: EngineConfig, model: ModelFacts, decisions: list[Decision]
) -> tuple[SpeculationConfig, DraftingConfig]:
    """Chains instead of trees of guesses where the model cannot take these."""
    speculation, drafting = asked.speculation, asked.drafting
    is_ngram = speculation.speculative_algorithm == "NGRAM"
    option = "speculative_ngram_max_bfs_breadth" if is_ngram else "speculative_eagle_topk"
    breadth: int = getattr(speculation if is_ngram else drafting, option)
    if speculation.speculative_algorithm is None or breadth == 1:
        return speculation, drafting
    why_not = why_no_trees(asked, model)
    reason = f"guesses are chains: {why_not}" if why_not else "guesses may be trees"
    decisions.append(Decision(option, 1 if why_not else breadth, reason))
    if why_not is None:
        return speculation, drafting
    return speculation.as_chains, replace(drafting, speculative_eagle_topk=1)


def why_steps_wait(
    speculation: SpeculationConfig, drafting: DraftingConfig, *, keeps_states: bool
) -> str | None:
    """Why no step is planned before it is known how many guesses of the last one were right; None
    if steps with guesses overlap where others do."""
    if speculation.speculative_algorithm not in MODEL_ALGORITHMS:
        return "guesses are made of the tokens that a step brings"
    if drafting.speculative_eagle_topk > 1:
        return "guesses are trees"
    if keeps_states:
        return "a state goes back where guesses were wrong"
    return None


def explain_speculation(
    scheduler: ResolvedScheduler,
    speculation: SpeculationConfig,
    drafting: DraftingConfig,
    model: ModelFacts,
    decisions: list[Decision],
) -> None:
    """Say how much is guessed, and when steps overlap that could have guesses."""
    if speculation.adapts:
        most = speculation.speculative_num_draft_tokens
        reason = (
            "at most: each step verifies the guesses that promise the most tokens per second, by "
            "how often guesses were right and by what steps cost, both measured; maybe none"
        )
        decisions.append(Decision("speculative_num_draft_tokens", most, reason))
    if speculation.is_lossy:
        reason = (
            "below 1: sampled outputs are not distributed as the model's, and depend on the "
            "guesses; greedy ones stay the same"
        )
        for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
            if getattr(speculation, name) < 1.0:
                decisions.append(Decision(name, getattr(speculation, name), reason))
    if speculation.speculative_algorithm is None or scheduler.overlap_depth == 1:
        return
    why = [decision.reason for decision in decisions if decision.option == "overlap_depth"]
    keeps_states = any(group.kind is CacheKind.STATE for group in model.cache)
    why_not = why_steps_wait(speculation, drafting, keeps_states=keeps_states)
    reason = f"{''.join(why) or 'asked for'}; steps with guesses overlap, too"
    if why_not is not None:
        reason = (
            f"{''.join(why) or 'asked for'}; with guesses, steps overlap only while none promise "
            f"to pay: {why_not}"
        )
    decisions[:] = [decision for decision in decisions if decision.option != "overlap_depth"]
    decisions.append(Decision("overlap_depth", scheduler.overlap_depth, reason))
