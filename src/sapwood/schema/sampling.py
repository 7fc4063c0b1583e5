"""How the next token of a request is chosen, and when the request ends."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator
from typing import Any

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits
from sapwood.schema.grammar import Grammar
from sapwood.schema.logits_processors import DISALLOWED_TOKENS, disallowed_token_ids
from sapwood.schema.speech import SpeechRules
from sapwood.schema.thinking import ThinkingBudget

GREEDY_BELOW = 1e-6
"""Temperatures below this mean greedy decoding."""
DEFAULTABLE = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Sampling parameters whose defaults a model may set in its generation_config.json."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One request's sampling parameters; names and defaults as in SGLang's native API.

    Raises InvalidRequest, naming the field, its value and its range, when one is out of range.

    max_new_tokens      output tokens at most; None: as many as the context length leaves
    min_new_tokens      EOS and stop tokens are masked before this many output tokens
    temperature         below 1e-6: greedy
    top_k               keep the k most likely tokens; -1: all
    top_p               keep the smallest set of tokens with at least this probability
    min_p               drop tokens less likely than min_p times the most likely one
    frequency_penalty   subtracted from a logit per occurrence in the output
    presence_penalty    subtracted once from the logit of each token in the output
    repetition_penalty  divides (or multiplies, if negative) the logit of each token seen
    penalty_window      penalties count that many of the last tokens of prompt and output; 0: none,
                        -1: all
    logit_bias          token id -> added to its logit
    allowed_token_ids   the only tokens of the output; (): any
    seed                same seed, same tokens, whatever else is in the batch; None: random
    stop                strings that end the output
    stop_regex          regular expressions that end the output where a match of one is complete
    stop_token_ids      token ids that end the output
    ignore_eos          go on after the model's end-of-sequence tokens
    no_stop_trim        leave the matched stop string or stop token in the text
    skip_special_tokens            leave special tokens out of the text
    spaces_between_special_tokens  put spaces between special tokens that are shown
    custom_logit_processor  name of a registered processor of logits, or, where the server allows
                            it, code as SGLang's clients send it
    custom_params           parameters of that processor
    grammar                 what the output must match; None: anything
    thinking_budget         when thinking before the answer is ended for the model; None: never
    speech                  which tokens may come in a transcription; None: the output is none
    """

    max_new_tokens: int | None = 128
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_k: int = -1
    top_p: float = 1.0
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    penalty_window: int = -1
    logit_bias: dict[int, float] = {}
    allowed_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_regex: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    no_stop_trim: bool = False
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    custom_logit_processor: str | None = None
    custom_params: dict[str, Any] = {}
    grammar: Grammar | None = None
    thinking_budget: ThinkingBudget | None = None
    speech: SpeechRules | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None:
            _check("max_new_tokens", self.max_new_tokens, low=0)
        _check("min_new_tokens", self.min_new_tokens, low=0, high=self.max_new_tokens)
        _check("temperature", self.temperature, low=0.0, high=1e6)
        if self.top_k != -1:
            _check("top_k", self.top_k, low=1)
        _check("top_p", self.top_p, low=0.0, high=1.0, open_low=True)
        _check("min_p", self.min_p, low=0.0, high=1.0)
        _check("frequency_penalty", self.frequency_penalty, low=-2.0, high=2.0)
        _check("presence_penalty", self.presence_penalty, low=-2.0, high=2.0)
        _check("repetition_penalty", self.repetition_penalty, low=0.0, high=2.0, open_low=True)
        _check("penalty_window", self.penalty_window, low=-1)
        if self.seed is not None:
            _check("seed", self.seed, low=-(2**63), high=2**64 - 1)
        for token_id, bias in self.logit_bias.items():
            _check(f"logit_bias[{token_id}]", bias, low=-100.0, high=100.0)
        if self.grammar is not None and self.ignore_eos:
            raise InvalidRequest(
                "ignore_eos goes on after the end, but an output that must match a grammar ends "
                "where the grammar does; leave one of them out",
                param="ignore_eos",
            )
        if self.grammar is not None and self.allowed_token_ids:
            raise InvalidRequest(
                "allowed_token_ids and a grammar both say which tokens may come, and together may "
                "leave none; give one of them",
                param="allowed_token_ids",
            )
        if any(not text for text in self.stop):
            raise InvalidRequest("stop has an empty string; leave it out", param="stop")
        for name, given in (("stop", self.stop), ("stop_regex", self.stop_regex)):
            limits.STOPS.check(len(given), name)
        limits.STOP_CHARACTERS.check(
            sum(map(len, self.stop)),
            "stop",
            hint="all its strings count together; shorten them or leave some out",
        )
        limits.CUSTOM_PROCESSOR.check(
            len(self.custom_logit_processor or ""), "custom_logit_processor"
        )
        if self.custom_params and self.custom_logit_processor is None:
            raise params_of_nothing("custom_params")
        if self.custom_logit_processor == DISALLOWED_TOKENS:
            disallowed_token_ids(self.custom_params)

    def token_ids(self) -> Iterator[tuple[str, Collection[int]]]:
        """(field, the token ids in it) of each field that has some. An id that the model does not
        know must not reach a kernel."""
        yield "logit_bias", self.logit_bias
        yield "allowed_token_ids", self.allowed_token_ids
        yield "stop_token_ids", self.stop_token_ids
        if self.custom_logit_processor == DISALLOWED_TOKENS:
            yield "custom_params", disallowed_token_ids(self.custom_params)
        if self.thinking_budget is not None:
            yield "thinking_budget", self.thinking_budget.forced
        if self.speech is not None:
            yield "speech", self.speech.token_ids()

    @property
    def is_greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1


def params_of_nothing(name: str) -> InvalidRequest:
    """name: of the field, in the request's own words"""
    return InvalidRequest(
        f"{name} are parameters of a custom_logit_processor, which is missing; name one or leave "
        "them out",
        param=name,
    )


def _check(
    name: str, value: float, *, low: float, high: float | None = None, open_low: bool = False
) -> None:
    too_low = value <= low if open_low else value < low
    too_high = high is not None and value > high
    if too_low or too_high or not math.isfinite(value):
        bracket = "(" if open_low else "["
        upper = "inf)" if high is None else f"{high}]"
        raise InvalidRequest(
            f"{name} is {value} but must be in {bracket}{low}, {upper}",
            param=name.partition("[")[0],
        )
