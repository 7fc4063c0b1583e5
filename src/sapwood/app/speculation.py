"""Makes what guesses tokens, as the configuration asks."""

from __future__ import annotations

from sapwood.engine.speculation import Speculation
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.drafting import DEFAULT_STEPS, MODEL_ALGORITHMS
from sapwood.schema.config.engine import ResolvedConfig
from sapwood.speculative.ngram import NgramDrafter


def build_speculation(config: ResolvedConfig, ledger: Ledger) -> Speculation | None:
    """None if nothing is to be guessed."""
    speculation = config.speculation
    algorithm = speculation.speculative_algorithm
    if algorithm is None:
        return None
    if algorithm in MODEL_ALGORITHMS:
        return Speculation(
            None,
            ledger,
            most_drafts=config.drafting.speculative_num_steps or DEFAULT_STEPS,
            most_step_tokens=speculation.speculative_max_step_tokens,
        )
    drafter = NgramDrafter(
        least_match=speculation.speculative_ngram_min_match_window_size,
        most_match=speculation.speculative_ngram_max_match_window_size,
    )
    return Speculation(
        drafter,
        ledger,
        most_drafts=speculation.speculative_num_draft_tokens,
        most_step_tokens=speculation.speculative_max_step_tokens,
    )
