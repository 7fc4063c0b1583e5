"""How much the answer to one call may tell besides its text: it is all held until it is sent."""

from __future__ import annotations

from sapwood.base.errors import InvalidRequest


class AnswerAllowance:
    """Shared by the requests of one call; each `take` raises InvalidRequest when it is too much.

    max_logprobs      log probabilities of prompts and outputs: of each token itself, of the
                      likeliest ones at its place, and of those asked for
    max_hidden_bytes  hidden states as fp32
    """

    def __init__(self, *, max_logprobs: int, max_hidden_bytes: int) -> None:
        self._max_logprobs = max_logprobs
        self._max_hidden_bytes = max_hidden_bytes
        self._num_logprobs = 0
        self._num_prompt_bytes = 0
        self._num_hidden_bytes = 0

    def take_logprobs(self, count: int) -> None:
        self._num_logprobs += count
        if self._num_logprobs > self._max_logprobs:
            raise InvalidRequest(
                f"the answer would have {self._num_logprobs} log probabilities or more, of all "
                f"prompts and samples together, but this server tells at most "
                f"{self._max_logprobs} in one call, its --max-logprobs-per-call; ask for fewer "
                "likeliest tokens, for those of fewer prompt tokens, or in several calls"
            )

    def take_hidden_prompt(self, num_bytes: int) -> None:
        """Before anything is computed: the hidden states that a prompt will have."""
        self._num_prompt_bytes += num_bytes
        self._check_hidden(self._num_prompt_bytes)

    def take_hidden(self, num_bytes: int) -> None:
        """The hidden states that have come, those of prompts included."""
        self._num_hidden_bytes += num_bytes
        self._check_hidden(self._num_hidden_bytes)

    def _check_hidden(self, num_bytes: int) -> None:
        if num_bytes > self._max_hidden_bytes:
            raise InvalidRequest(
                f"the answer would have {num_bytes} bytes of hidden states as fp32 or more, but "
                f"this server tells at most {self._max_hidden_bytes} in one call, its "
                "--max-request-bytes; send shorter prompts, or several calls",
                param="return_hidden_states",
            )
