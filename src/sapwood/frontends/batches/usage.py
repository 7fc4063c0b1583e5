"""The tokens of a whole batch, in the fields of OpenAI's batches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class BatchUsage:
    """Adds up the usages of answers: those of chats and completions, and those of responses."""

    def __init__(self) -> None:
        self._num_input_tokens = 0
        self._num_cached_tokens = 0
        self._num_output_tokens = 0
        self._num_reasoning_tokens = 0

    def add(self, usage: Mapping[str, Any]) -> None:
        self._num_input_tokens += _first(usage, "prompt_tokens", "input_tokens")
        self._num_output_tokens += _first(usage, "completion_tokens", "output_tokens")
        read = _first_part(usage, "prompt_tokens_details", "input_tokens_details")
        self._num_cached_tokens += _first(read, "cached_tokens")
        written = _first_part(usage, "completion_tokens_details", "output_tokens_details")
        self._num_reasoning_tokens += _first(written, "reasoning_tokens") or _first(
            usage, "reasoning_tokens"
        )

    def shown(self) -> dict[str, Any]:
        return {
            "input_tokens": self._num_input_tokens,
            "input_tokens_details": {"cached_tokens": self._num_cached_tokens},
            "output_tokens": self._num_output_tokens,
            "output_tokens_details": {"reasoning_tokens": self._num_reasoning_tokens},
            "total_tokens": self._num_input_tokens + self._num_output_tokens,
        }


def _first(counts: Mapping[str, Any], *names: str) -> int:
    return next((int(counts[name]) for name in names if counts.get(name)), 0)


def _first_part(usage: Mapping[str, Any], *names: str) -> Mapping[str, Any]:
    return next((usage[name] for name in names if usage.get(name)), {})
