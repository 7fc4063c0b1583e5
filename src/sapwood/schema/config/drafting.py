"""A draft model: which one guesses tokens, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.model import LOAD_FORMATS, QUANTIZATIONS
from sapwood.schema.config.options import check_options, option, option_specs

MODEL_ALGORITHMS = ("STANDALONE",)
"""Values of --speculative-algorithm that guess with a draft model."""
DEFAULT_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftingConfig:
    speculative_draft_model_path: str | None = option(
        None,
        "The draft model of --speculative-algorithm STANDALONE, as --model names a model: a small "
        "one with the same vocabulary.",
        aliases=["speculative-draft-model"],
    )
    speculative_draft_model_revision: str | None = option(
        None, "Branch, tag or commit of the draft model's hub repository."
    )
    speculative_draft_load_format: str | None = option(
        None,
        "Format of the draft model's weights; default: as --load-format.",
        choices=LOAD_FORMATS,
    )
    speculative_draft_model_quantization: str | None = option(
        None,
        "Numbers of the draft model's weights, as --quantization; default: what is stored.",
        choices=QUANTIZATIONS,
    )
    speculative_num_steps: int | None = option(
        None,
        "Tokens that a draft model guesses for one request in one step at most, one after the "
        f"other. Default: {DEFAULT_STEPS}.",
        unit="tokens",
    )

    def __post_init__(self) -> None:
        check_options(self)
        steps = self.speculative_num_steps
        if steps is not None and steps < 1:
            raise ConfigError(f"--speculative-num-steps is {steps} but must be >= 1")

    @property
    def given(self) -> tuple[str, ...]:
        """Flags of the options that somebody gave."""
        return tuple(
            spec.flag
            for spec in option_specs(type(self))
            if getattr(self, spec.name) != spec.default
        )
