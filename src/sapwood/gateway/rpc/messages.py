"""Requests for tokens as messages of the service, and its messages as outputs."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sapwood.base.errors import UnsupportedFeature
from sapwood.gateway.plain.generate import (
    MAX_ID,
    MalformedAnswer,
    check_request,
    grammar_fields,
    packed_logprobs,
)
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.schema.logprobs import TokenLogprobs
from sapwood.schema.output import Finish, RequestOutput
from sapwood.schema.request import Generate

_SAME = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "frequency_penalty",
    "presence_penalty",
    "repetition_penalty",
    "min_new_tokens",
    "ignore_eos",
)
_GRAMMARS = {"ebnf": "ebnf_grammar"}


def generate_message(
    request: Generate, *, lora: str, max_new_tokens: int | None
) -> pb.GenerateRequest:
    """UnsupportedFeature for what the service has no field for."""
    options, sampling = request.options, request.options.sampling
    check_request(request)
    _refuse("seed", sampling.seed is not None)
    params = pb.SamplingParams(
        n=1,
        max_new_tokens=max_new_tokens,
        stop_token_ids=sampling.stop_token_ids,
        # The gateway makes the text.
        skip_special_tokens=True,
        spaces_between_special_tokens=True,
        logit_bias={str(token_id): bias for token_id, bias in sampling.logit_bias.items()},
        **{name: getattr(sampling, name) for name in _SAME},
    )
    if sampling.grammar is not None:
        for kind, text in grammar_fields(sampling.grammar).items():
            setattr(params, _GRAMMARS.get(kind, kind), text)
    logprobs = options.logprobs
    return pb.GenerateRequest(
        request_id=request.request_id,
        tokenized=pb.TokenizedInput(input_ids=request.prompt_ids),
        sampling_params=params,
        return_logprob=logprobs is not None,
        logprob_start_len=-1,
        top_logprobs_num=0 if logprobs is None else logprobs.num_top,
        data_parallel_rank=_placed(request),
        lora_id=lora,
        stream=True,
    )


def embed_message(request: Generate) -> pb.EmbedRequest:
    embed = request.options.embed
    _refuse("a pair of texts", embed is not None and embed.num_first is not None)
    return pb.EmbedRequest(
        request_id=request.request_id,
        tokenized=pb.TokenizedInput(input_ids=request.prompt_ids),
        # Without a presence of its own, 0 means any replica.
        data_parallel_rank=_placed(request) or 0,
    )


def _placed(request: Generate) -> int | None:
    """The replica asked for. Fields that say how urgent the request is, or apart from others, have
    no place in a message; the routing key is the gateway's."""
    _refuse("priority", request.options.priority is not None)
    _refuse("extra_key", bool(request.options.namespace))
    return request.options.data_parallel_rank


def _refuse(name: str, is_asked: bool) -> None:
    if is_asked:
        raise UnsupportedFeature(
            f"{name} is not possible where the workers are reached by gRPC, which has no field for "
            "it; leave it out, or add workers that are reached by HTTP",
            param=name,
        )


class Messages:
    """Reads the messages of one Generate.

    ends  token ids that end a model's outputs. The message that says so comes after the one that
          has the token: both make one output, so that such a token is not taken for text
    """

    def __init__(self, request: Generate, ends: Collection[int]) -> None:
        self._request = request
        self._ends = frozenset((*ends, *request.options.sampling.stop_token_ids))
        self._num_ids = 0
        self.is_done = False

    def output(self, message: pb.GenerateResponse) -> RequestOutput:
        if message.HasField("complete"):
            return self._last(message.complete)
        if not message.HasField("chunk"):
            raise MalformedAnswer("a message has neither a chunk nor an end")
        chunk = message.chunk
        ids = self._ids(chunk.token_ids)
        return self._made(
            ids, chunk.cached_tokens, self._logprobs(chunk.output_logprobs, len(ids)), None
        )

    def may_end(self, output: RequestOutput) -> bool:
        """Whether the next message probably says that this was the end."""
        return bool(output.token_ids) and output.token_ids[-1] in self._ends

    def _last(self, complete: pb.GenerateComplete) -> RequestOutput:
        ids, logprobs = [], None
        if not self._num_ids:  # a server that has sent no chunks
            ids = self._ids(complete.output_ids)
            logprobs = self._logprobs(complete.output_logprobs, len(ids))
        if complete.completion_tokens != self._num_ids:
            raise MalformedAnswer(
                f"{complete.completion_tokens} tokens were made but {self._num_ids} have come"
            )
        self.is_done = True
        return self._made(ids, complete.cached_tokens, logprobs, _finish(complete))

    def _ids(self, given: Sequence[int]) -> list[int]:
        ids = list(given)
        if ids and max(ids) > MAX_ID:
            raise MalformedAnswer(f"a message has the token id {max(ids)}")
        self._num_ids += len(ids)
        return ids

    def _logprobs(self, told: pb.OutputLogProbs, num_new: int) -> TokenLogprobs | None:
        asked = self._request.options.logprobs
        if asked is None or not num_new:
            return None
        top = [
            list(zip(row.values, row.token_ids, strict=False))[: asked.num_top]
            for row in told.top_logprobs
        ]
        are_all = not asked.num_top or [len(row) for row in top] == [asked.num_top] * num_new
        if len(told.token_logprobs) != num_new or not are_all:
            raise MalformedAnswer("a message lacks log probabilities that were asked for")
        return packed_logprobs(told.token_logprobs, top if asked.num_top else [])

    def _made(
        self,
        ids: list[int],
        num_cached: int,
        logprobs: TokenLogprobs | None,
        finish: Finish | None,
    ) -> RequestOutput:
        return RequestOutput(
            request_id=self._request.request_id,
            token_ids=ids,
            num_prompt_tokens=len(self._request.prompt_ids),
            num_cached_tokens=num_cached,
            logprobs=logprobs,
            finish=finish,
        )


def _finish(complete: pb.GenerateComplete) -> Finish:
    if complete.finish_reason == "length":
        return Finish(kind="length")
    if complete.finish_reason == "stop":
        which = complete.WhichOneof("matched_stop")
        return Finish(kind="stop", matched=None if which is None else getattr(complete, which))
    return Finish(kind="abort", message="the engine has ended the request")
