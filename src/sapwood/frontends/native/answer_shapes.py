"""What the native endpoints answer, for the OpenAPI document.

Answers may have further fields; those that are named here are always there.
"""

from __future__ import annotations

from typing import Any

import msgspec


class GenerateAnswer(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    output_ids: list[int]
    meta_info: dict[str, Any]


class TokenPiece(msgspec.Struct, frozen=True, kw_only=True):
    """A token with its text, or with its bytes if it is a part of a character."""

    id: int
    piece: str | list[int]


class TokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The tokens and their count; for several texts, a list for each text."""

    tokens: list[int | TokenPiece | list[int | TokenPiece]]
    count: int | list[int]
    max_model_len: int


class DetokenizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    text: str | list[str]


class FunctionCallAnswer(msgspec.Struct, frozen=True, kw_only=True):
    normal_text: str
    calls: list[dict[str, Any]]


class ReasoningAnswer(msgspec.Struct, frozen=True, kw_only=True):
    reasoning_text: str
    text: str


class HealthAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """`ranks` has the rank, the stage and the device of each, if several compute the model."""

    status: str
    ranks: list[dict[str, Any]] = []


class ModelInfo(msgspec.Struct, frozen=True, kw_only=True):
    model_path: str
    tokenizer_path: str
    is_generation: bool
    weight_version: str
    has_image_understanding: bool
    has_audio_understanding: bool
    model_type: str | None
    architectures: list[str]


class ServerInfo(msgspec.Struct, frozen=True, kw_only=True):
    """The answer also has every resolved option, each under its own name.

    `ranks` tells of each rank where it runs and what it loaded, if several compute the model."""

    version: str
    model_path: str
    tokenizer_path: str
    served_model_name: str
    status: str
    max_total_num_tokens: int
    max_req_input_len: int
    internal_states: list[dict[str, Any]]
    notes: list[str]
    ranks: list[dict[str, Any]] = []


class Done(msgspec.Struct, frozen=True, kw_only=True):
    success: bool
    message: str


class Aborted(msgspec.Struct, frozen=True, kw_only=True):
    """`aborted` has the ids of the requests that were ended."""

    success: bool
    aborted: list[str]


class AdaptersChanged(msgspec.Struct, frozen=True, kw_only=True):
    """`loaded_adapters` has the folder of each LoRA adapter, by name; `error_message` says why
    nothing was changed."""

    success: bool
    error_message: str
    loaded_adapters: dict[str, str]


class PoolingAnswer(msgspec.Struct, frozen=True, kw_only=True):
    embedding: list[float]
    meta_info: dict[str, Any]


class Classes(msgspec.Struct, frozen=True, kw_only=True):
    id: str
    object: str
    created: int
    model: str
    data: list[dict[str, Any]]
    usage: dict[str, int]


class Scores(msgspec.Struct, frozen=True, kw_only=True):
    scores: list[list[float]]
    model: str
    object: str
    usage: dict[str, int]


class Ranked(msgspec.Struct, frozen=True, kw_only=True):
    """One document's score. The field `document` is there if return_documents was asked for."""

    score: float
    index: int
    meta_info: dict[str, Any]
