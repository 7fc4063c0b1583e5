"""How much one call may ask for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.schema import limits
from sapwood.schema.logits_processors import DISALLOWED_TOKENS
from sapwood.text.allowance import AnswerAllowance
from sapwood.text.generation import TextRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestLimits:
    """Limits on the contents of one call.

    max_samples      number of prompts times n
    max_stop_length  characters of one stop string
    max_embed_bytes  bytes of all input_embeds as fp32, times n: each sample sends its own prompt
    max_logprobs     log probabilities that the answer may have, of prompts and outputs
    max_token_ids    token ids in parameters of sampling, such as logit_bias, times n likewise
    """

    max_samples: int = limits.CALL_SAMPLES.most
    max_stop_strings: int = limits.CALL_STOPS.most
    max_stop_length: int = limits.STOP_LENGTH.most
    max_embed_bytes: int = limits.BODY_BYTES.most
    max_logprobs: int = limits.LOGPROBS.most
    max_token_ids: int = limits.CALL_TOKEN_IDS.most

    def allowance(self) -> AnswerAllowance:
        """The allowance of one call: hidden states may be as large as input_embeds may be."""
        return AnswerAllowance(max_logprobs=self.max_logprobs, max_bytes=self.max_embed_bytes)

    def check(self, requests: Sequence[TextRequest]) -> None:
        """Raises InvalidRequest, which names the field, if the call exceeds a limit."""
        num_samples = sum(request.n for request in requests)
        if num_samples > self.max_samples:
            raise InvalidRequest(
                f"the call asks for {num_samples} samples, prompts times n, but this server "
                f"accepts at most {self.max_samples}; send several calls",
                param="n",
            )
        num_bytes = sum(sum(map(len, request.input_embeds)) * request.n for request in requests)
        if num_bytes > self.max_embed_bytes:
            raise InvalidRequest(
                f"input_embeds are {num_bytes} bytes as fp32, times n, but this server accepts at "
                f"most {self.max_embed_bytes}, its --max-request-bytes; send several calls",
                param="input_embeds",
            )
        num_ids = Counter[str]()
        for request in requests:
            for name, token_ids in request.options.sampling.token_ids():
                num_ids[name] += len(token_ids) * request.n
        for name, count in num_ids.items():
            if count > self.max_token_ids:
                raise InvalidRequest(
                    f"{name} has {count} token ids, times n, but this server accepts at most "
                    f"{self.max_token_ids} in one call; send several calls",
                    param=name,
                )
        limits.CUSTOM_PARAMS.check(
            sum(_custom_bytes(request) for request in requests),
            "custom_params",
            hint="those of all samples count; send several calls",
        )
        for request in requests:
            self._check_stop(request.options.sampling.stop)

    def _check_stop(self, stop: Sequence[str]) -> None:
        if len(stop) > self.max_stop_strings:
            raise InvalidRequest(
                f"stop has {len(stop)} strings but this server accepts at most "
                f"{self.max_stop_strings}",
                param="stop",
            )
        longest = max(map(len, stop), default=0)
        if longest > self.max_stop_length:
            raise InvalidRequest(
                f"stop has a string of {longest} characters but this server accepts at most "
                f"{self.max_stop_length}",
                param="stop",
            )


def _custom_bytes(request: TextRequest) -> int:
    """Bytes of its processor's parameters, in all the messages to the engine that carry them."""
    sampling = request.options.sampling
    if not sampling.custom_params or sampling.custom_logit_processor == DISALLOWED_TOKENS:
        return 0  # token ids have a limit of their own
    return len(msgspec.msgpack.encode(sampling.custom_params)) * request.n
