"""How much the answer to one call may tell besides its text: it is all held until it is sent."""

from __future__ import annotations

from collections import Counter

from sapwood.base.errors import InvalidRequest

TOLD = {
    "return_hidden_states": "hidden states as fp32",
    "return_routed_experts": "routed experts as int32",
}
"""Field of a request -> what its answer then has of every token."""


class AnswerAllowance:
    """Shared by the requests of one call; each `take` raises InvalidRequest when it is too much.

    max_logprobs      log probabilities of prompts and outputs: of each token itself, of the
                      likeliest ones at its place, and of those asked for
    max_bytes         of each kind in TOLD
    """

    def __init__(self, *, max_logprobs: int, max_bytes: int) -> None:
        self._max_logprobs = max_logprobs
        self._max_bytes = max_bytes
        self._num_logprobs = 0
        self._num_prompt_bytes: Counter[str] = Counter()
        self._num_bytes: Counter[str] = Counter()

    def take_logprobs(self, count: int) -> None:
        self._num_logprobs += count
        if self._num_logprobs > self._max_logprobs:
            raise InvalidRequest(
                f"the answer would have {self._num_logprobs} log probabilities or more, of all "
                f"prompts and samples together, but this server tells at most "
                f"{self._max_logprobs} in one call, its --max-logprobs-per-call; ask for fewer "
                "likeliest tokens, for those of fewer prompt tokens, or in several calls"
            )

    def take_prompt_bytes(self, field: str, num_bytes: int) -> None:
        """Before anything is computed: what the answer will tell of a prompt's tokens.

        field  of the request, which asks for that; one of TOLD
        """
        self._num_prompt_bytes[field] += num_bytes
        self._check_bytes(field, self._num_prompt_bytes[field])

    def take_bytes(self, field: str, num_bytes: int) -> None:
        """What has come of tokens, those of prompts included."""
        self._num_bytes[field] += num_bytes
        self._check_bytes(field, self._num_bytes[field])

    def _check_bytes(self, field: str, num_bytes: int) -> None:
        if num_bytes > self._max_bytes:
            raise InvalidRequest(
                f"the answer would have {num_bytes} bytes of {TOLD[field]} or more, but this "
                f"server tells at most {self._max_bytes} in one call, its --max-request-bytes; "
                "send shorter prompts, or several calls",
                param=field,
            )
