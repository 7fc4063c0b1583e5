"""Makes what guesses tokens, as the configuration asks."""

from __future__ import annotations

from sapwood.engine.speculation import Speculation
from sapwood.memory.ledger import Ledger
from sapwood.schema.config.speculation import SpeculationConfig
from sapwood.speculative.ngram import NgramDrafter


def build_speculation(config: SpeculationConfig, ledger: Ledger) -> Speculation | None:
    """None if nothing is to be guessed."""
    if config.speculative_algorithm is None:
        return None
    drafter = NgramDrafter(
        least_match=config.speculative_ngram_min_match_window_size,
        most_match=config.speculative_ngram_max_match_window_size,
    )
    return Speculation(
        drafter,
        ledger,
        most_drafts=config.speculative_num_draft_tokens,
        most_step_tokens=config.speculative_max_step_tokens,
    )
