"""Ollama's options -> SamplingParams."""

from __future__ import annotations

from typing import Any

from sapwood.base.errors import InvalidRequest
from sapwood.frontends.ollama.protocol import OPTION_FIELDS
from sapwood.frontends.serving.sampling import over_defaults, renamed, stop_strings
from sapwood.frontends.serving.services import Services
from sapwood.schema.fields import parse
from sapwood.schema.grammar import Grammar, json_object, json_schema
from sapwood.schema.sampling import SamplingParams

_UNLIMITED = (-1, -2)

OLLAMA_DEFAULTS: dict[str, float] = {
    "temperature": 0.8,
    "top_k": 40,
    "top_p": 0.9,
    "repetition_penalty": 1.1,
}
"""What Ollama takes where neither the request nor the model says anything. Source: its API."""
OLLAMA_WINDOW = 64
"""Ollama's default of repeat_last_n, for the same models."""

_NAMES = {"max_new_tokens": "num_predict", "repetition_penalty": "repeat_penalty"}


def sampling_params(
    options: dict[str, Any], services: Services, answer_format: str | dict[str, Any] | None = None
) -> SamplingParams:
    """The sampling parameters of a request.

    answer_format  the request's field `format`
    Raises         InvalidRequest, which names options.<field>
    """
    fields = parse(options, OPTION_FIELDS, where="options")
    # A model whose authors advise some parameters was tried without the others.
    as_ollama = services.has_dialect_defaults and not services.default_sampling
    window = OLLAMA_WINDOW if as_ollama else -1
    all_tokens = fields.top_k is not None and fields.top_k <= 0
    chosen = over_defaults(
        OLLAMA_DEFAULTS if as_ollama else services.default_sampling,
        temperature=fields.temperature,
        top_p=fields.top_p,
        top_k=-1 if all_tokens else fields.top_k,
        min_p=fields.min_p,
        repetition_penalty=fields.repeat_penalty,
    )
    try:
        return SamplingParams(
            max_new_tokens=None if fields.num_predict in _UNLIMITED else fields.num_predict,
            frequency_penalty=fields.frequency_penalty,
            presence_penalty=fields.presence_penalty,
            penalty_window=window if fields.repeat_last_n is None else fields.repeat_last_n,
            seed=None if fields.seed == -1 else fields.seed,
            stop=stop_strings(fields.stop),
            grammar=_grammar(answer_format),
            **chosen,  # type: ignore[arg-type]
        )
    except InvalidRequest as error:
        raise renamed(error, _NAMES, where="options") from None


def _grammar(answer_format: str | dict[str, Any] | None) -> Grammar | None:
    if answer_format is None or answer_format == "":
        return None
    if isinstance(answer_format, dict):
        return json_schema(answer_format, param="format")
    if answer_format != "json":
        raise InvalidRequest(
            f'format is {answer_format!r} but must be "json" or a JSON Schema', param="format"
        )
    return json_object()
