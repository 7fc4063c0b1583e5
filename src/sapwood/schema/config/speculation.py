"""Guessing tokens that a step then verifies."""

from __future__ import annotations

from dataclasses import dataclass, replace

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
        "model guesses, --speculative-draft-model-path. EAGLE, EAGLE3: what a head guesses that "
        "goes on from the model's hidden states; NEXTN is EAGLE. Default: nothing is guessed.",
        choices=ALGORITHMS,
    )
    speculative_num_draft_tokens: int = option(
        32,
        "Tokens of one request that a step computes at most: its last token, and those that are "
        "guessed.",
        unit="tokens",
    )
    speculative_max_step_tokens: int = option(
        64, "New tokens of a step with guesses at most, of all requests together.", unit="tokens"
    )
    disable_speculative_adaptation: bool = option(
        False,
        "Guess as many tokens as the other options allow. Default: each step verifies the guesses "
        "that promise the most tokens per second, by how often guesses were right and by what "
        "steps cost, both measured; where no guesses pay, there are none.",
    )
    speculative_accept_threshold_single: float = option(
        1.0,
        "Below 1, a guess is taken if the model gives it at least this probability, whatever "
        "would be sampled. Only for requests that sample; their outputs are then no longer "
        "distributed as the model's.",
        unit="a share of 1",
    )
    speculative_accept_threshold_acc: float = option(
        1.0,
        "Below 1, guesses of a token are taken as if their probabilities were divided by this "
        "number. Only for requests that sample; their outputs are then no longer distributed as "
        "the model's.",
        unit="a share of 1",
    )
    speculative_ngram_min_match_window_size: int = option(
        1, "NGRAM guesses if at least this many of the last tokens occurred before.", unit="tokens"
    )
    speculative_ngram_max_match_window_size: int = option(
        12, "NGRAM compares this many of the last tokens at most.", unit="tokens"
    )
    speculative_ngram_branch_length: int = option(
        31, "NGRAM copies this many tokens in a row at most.", unit="tokens"
    )
    speculative_ngram_min_bfs_breadth: int = option(
        1,
        "Guesses of NGRAM that may follow the same token, after a match of "
        "--speculative-ngram-max-match-window-size tokens.",
        unit="guesses",
    )
    speculative_ngram_max_bfs_breadth: int = option(
        10,
        "The same after a match of --speculative-ngram-min-match-window-size tokens; in between, "
        "the longer the match, the fewer. 1: guesses are a chain, not a tree.",
        unit="guesses",
    )
    speculative_ngram_match_type: str = option(
        "BFS",
        "Which of several tokens that followed a match NGRAM guesses first: BFS: the latest; PROB: "
        "the most frequent.",
        choices=("BFS", "PROB"),
    )
    speculative_ngram_capacity: int = option(
        1_000_000,
        "Tokens of prompts and outputs that NGRAM remembers, of all requests together; each takes "
        "about 200 bytes.",
        unit="tokens",
    )

    @property
    def adapts(self) -> bool:
        """Whether what steps cost decides how much is guessed."""
        return self.speculative_algorithm is not None and not self.disable_speculative_adaptation

    def __post_init__(self) -> None:
        check_options(self)
        if self.speculative_algorithm is None:
            self._refuse_idle_options()
        for name, least in (
            ("speculative_num_draft_tokens", 2),
            ("speculative_max_step_tokens", 2),
            ("speculative_ngram_min_match_window_size", 1),
            ("speculative_ngram_branch_length", 1),
            ("speculative_ngram_min_bfs_breadth", 1),
            ("speculative_ngram_capacity", 1024),
        ):
            if getattr(self, name) < least:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)} but must be >= {least}"
                )
        for name in ("speculative_accept_threshold_single", "speculative_accept_threshold_acc"):
            if not 0.0 < getattr(self, name) <= 1.0:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)} but must be above 0 and "
                    "at most 1; 1 takes only guesses that the model itself chooses"
                )
        least_match = self.speculative_ngram_min_match_window_size
        if self.speculative_ngram_max_match_window_size < least_match:
            raise ConfigError(
                "--speculative-ngram-max-match-window-size is "
                f"{self.speculative_ngram_max_match_window_size} but must be at least "
                f"--speculative-ngram-min-match-window-size, which is {least_match}"
            )

        least_breadth = self.speculative_ngram_min_bfs_breadth
        if self.speculative_ngram_max_bfs_breadth < least_breadth:
            raise ConfigError(
                "--speculative-ngram-max-bfs-breadth is "
                f"{self.speculative_ngram_max_bfs_breadth} but must be at least "
                f"--speculative-ngram-min-bfs-breadth, which is {least_breadth}"
            )

    @property
    def is_lossy(self) -> bool:
        """Whether guesses are taken that are not the tokens which would have been sampled."""
        return (
            min(self.speculative_accept_threshold_single, self.speculative_accept_threshold_acc)
            < 1.0
        )

    @property
    def as_chains(self) -> SpeculationConfig:
        """The same without trees of guesses."""
        return replace(
            self, speculative_ngram_min_bfs_breadth=1, speculative_ngram_max_bfs_breadth=1
        )

    def _refuse_idle_options(self) -> None:
        for spec in option_specs(type(self)):
            if getattr(self, spec.name) != spec.default:
                raise ConfigError(
                    f"--{spec.name.replace('_', '-')} does nothing without --speculative-algorithm;"
                    " give both or neither"
                )
