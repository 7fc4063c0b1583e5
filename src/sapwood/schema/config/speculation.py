"""Guessing tokens that a step then verifies."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.drafting import MODEL_ALGORITHMS
from sapwood.schema.config.options import check_options, option, option_specs

ALGORITHMS = ("NGRAM", *MODEL_ALGORITHMS)


@dataclass(frozen=True, slots=True, kw_only=True)
class SpeculationConfig:
    speculative_algorithm: str | None = option(
        None,
        "Guess several tokens of a request per step and keep those that the model itself chooses; "
        "the output stays the same. NGRAM: what followed the last tokens where they occurred "
        "before in the prompt or the output. STANDALONE: what a small "
        "model guesses, --speculative-draft-model-path. Default: nothing is guessed.",
        choices=ALGORITHMS,
    )
    speculative_num_draft_tokens: int = option(
        8, "Tokens guessed for one request in one step at most.", unit="tokens"
    )
    speculative_max_step_tokens: int = option(
        32,
        "New tokens of a step with guesses at most: with more, a step costs more than the guesses "
        "save. While more than half as many requests run, nothing is guessed.",
        unit="tokens",
    )
    speculative_ngram_min_match_window_size: int = option(
        2, "NGRAM guesses if at least this many of the last tokens occurred before.", unit="tokens"
    )
    speculative_ngram_max_match_window_size: int = option(
        12, "NGRAM compares this many of the last tokens at most.", unit="tokens"
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.speculative_algorithm is None:
            self._refuse_idle_options()
        for name, least in (
            ("speculative_num_draft_tokens", 1),
            ("speculative_max_step_tokens", 2),
            ("speculative_ngram_min_match_window_size", 1),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)} but must be >= {least}"
                )
        least_match = self.speculative_ngram_min_match_window_size
        if self.speculative_ngram_max_match_window_size < least_match:
            raise ConfigError(
                "--speculative-ngram-max-match-window-size is "
                f"{self.speculative_ngram_max_match_window_size} but must be at least "
                f"--speculative-ngram-min-match-window-size, which is {least_match}"
            )

    def _refuse_idle_options(self) -> None:
        for spec in option_specs(type(self)):
            if getattr(self, spec.name) != spec.default:
                raise ConfigError(
                    f"--{spec.name.replace('_', '-')} does nothing without --speculative-algorithm;"
                    " give both or neither"
                )
