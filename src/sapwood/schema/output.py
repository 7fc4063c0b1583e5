"""What an engine answers."""

from __future__ import annotations

from typing import Literal

import msgspec


class Finish(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Why a request ended.

    kind     stop: end of sequence, stop token or stop string; length: a token limit;
             abort: by the client or by a drain; error: `message` and the HTTP `status` say which
    matched  the stop token id or stop string, for kind "stop"
    """

    kind: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None
    message: str | None = None
    status: int = 500
    error_type: str = "InternalServerError"


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """New output tokens of one request. Exactly one output of a request has a `finish`.

    token_ids          new output tokens, including a matched stop token
    num_prompt_tokens  prompt length in tokens
    num_cached_tokens  prompt tokens that came from the prefix cache
    queue_time_s       seconds between arrival and the first step that computed something
    """

    request_id: str
    token_ids: list[int]
    num_prompt_tokens: int
    num_cached_tokens: int = 0
    queue_time_s: float = 0.0
    finish: Finish | None = None


class StepOutputs(msgspec.Struct, frozen=True, tag=True):
    """The outputs of one step, of several requests."""

    outputs: list[RequestOutput]


class EngineReady(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """The first message of an engine.

    context_length    prompt and output tokens of one request at most
    max_total_tokens  tokens that the KV pool holds
    notes             what was resolved and why, one line each
    """

    context_length: int
    max_total_tokens: int
    page_size: int
    notes: list[str]


class EngineFatal(msgspec.Struct, frozen=True, tag=True):
    """The last message of an engine that cannot go on."""

    reason: str


class CacheFlushed(msgspec.Struct, frozen=True, tag=True):
    call_id: str
    done: bool
    message: str


class EngineStatus(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Counters and gauges; counters grow from the engine's start.

    num_computed_tokens  tokens that went through the model
    num_cached_tokens    prompt tokens that a prefix hit saved
    """

    call_id: str
    num_running: int
    num_waiting: int
    num_pages: int
    num_free_pages: int
    num_cached_pages: int
    num_leased_pages: int
    num_steps: int
    num_computed_tokens: int
    num_cached_tokens: int
    num_output_tokens: int
    num_finished: int
    num_aborted: int
    num_refused: int
    num_retractions: int


EngineOutput = StepOutputs | EngineReady | EngineFatal | CacheFlushed | EngineStatus
