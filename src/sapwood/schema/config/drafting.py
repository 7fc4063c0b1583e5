"""A draft model: which one guesses tokens, and how many."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.model import LOAD_FORMATS, QUANTIZATIONS
from sapwood.schema.config.options import check_options, option, option_specs
from sapwood.schema.draft_tree import TREE_TOKENS

OWN_ALGORITHMS = ("EAGLE", "NEXTN")
"""Values of --speculative-algorithm that may use layers of the model's own checkpoint."""
HEAD_ALGORITHMS = (*OWN_ALGORITHMS, "EAGLE3")
"""Those that go on from the model's hidden states."""
MODEL_ALGORITHMS = ("STANDALONE", *HEAD_ALGORITHMS)
"""Those that guess with a draft model."""
DEFAULT_STEPS = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class DraftingConfig:
    speculative_draft_model_path: str | None = option(
        None,
        "What guesses, as --model names a model. STANDALONE: a small model with the same "
        "vocabulary; EAGLE, EAGLE3: a head of that kind for this model. Default for EAGLE: the "
        "layer by which the model's own checkpoint predicts further tokens.",
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
        "Numbers of the draft model's weights, as --quantization; default: what is stored. Layers "
        "of the model's own checkpoint are quantised as the model.",
        choices=QUANTIZATIONS,
    )
    speculative_num_steps: int | None = option(
        None,
        "Tokens that a draft model guesses for one request in one step at most, one after the "
        f"other. Default: {DEFAULT_STEPS}.",
        unit="tokens",
    )
    speculative_eagle_topk: int = option(
        1,
        "Guesses of a draft model that may follow the same token. Above 1, guesses are a tree: the "
        "draft model goes on from so many of its likeliest guesses at once, and the likeliest "
        "--speculative-num-draft-tokens - 1 of all are verified.",
        unit="guesses",
    )
    enable_multi_layer_eagle: bool = option(
        False,
        "Let each guess be made by a layer of its own, of a model whose checkpoint has several "
        "layers that predict further tokens. Default: the first of them makes all guesses.",
    )
    speculative_token_map: str | None = option(
        None,
        "File with the ids of the tokens that a head of EAGLE or NEXTN may guess, as a list: .pt "
        "or .json. The head then computes the logits of these tokens alone. Default: all tokens. A "
        "head of EAGLE3 has a list of its own.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("speculative_eagle_topk", "speculative_num_steps"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be >= 1")
        topk, steps = self.speculative_eagle_topk, self.speculative_num_steps or DEFAULT_STEPS
        if topk > 1 and self.enable_multi_layer_eagle:
            raise ConfigError(
                f"--enable-multi-layer-eagle makes chains of guesses, but --speculative-eagle-topk "
                f"is {topk}; leave out one of the two"
            )
        num_computed = topk * (steps - 1)
        if topk > 1 and num_computed >= TREE_TOKENS:
            raise ConfigError(
                f"--speculative-eagle-topk {topk} with --speculative-num-steps {steps} lets a "
                f"draft model compute up to {topk} * {steps - 1} = {num_computed} guesses of a "
                f"tree, but at most {TREE_TOKENS - 1} are possible; choose less of one or the other"
            )

    @property
    def given(self) -> tuple[str, ...]:
        """Flags of the options that somebody gave."""
        return tuple(
            spec.flag
            for spec in option_specs(type(self))
            if getattr(self, spec.name) != spec.default
        )

    @property
    def given_of_other_model(self) -> tuple[str, ...]:
        """Those of them that are about files of a draft model."""
        return tuple(flag for flag in self.given if flag.startswith("--speculative-draft-"))
