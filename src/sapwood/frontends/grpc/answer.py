"""What the server makes -> messages of the service."""

from __future__ import annotations

from sapwood.frontends.serving.encoded_lists import in_pieces
from sapwood.frontends.serving.generate import Choice
from sapwood.rpc import scheduler_pb2 as pb
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.output import Finish
from sapwood.text.generation import ScoredPrompt, TextChunk, TextRequest


class SampleAnswer:
    """The messages about one sample.

    With `stream` each chunk is told as it comes, and only its tokens are kept for the last message.
    """

    def __init__(self, request: TextRequest, index: int, *, stream: bool) -> None:
        self._id = request.request_id
        self._asked = request.options.logprobs
        self._index = index
        self._stream = stream
        self._ids: list[int] = []
        self._choice = Choice()

    async def messages(self, chunk: TextChunk) -> list[pb.GenerateResponse]:
        told: list[pb.GenerateResponse] = []
        if self._stream:
            self._ids.extend(chunk.token_ids)
            told.append(pb.GenerateResponse(request_id=self._id, chunk=await self._chunk(chunk)))
        else:
            self._choice.add(chunk)
        if chunk.finish is not None:
            complete = await self._complete(chunk, chunk.finish)
            told.append(pb.GenerateResponse(request_id=self._id, complete=complete))
        return told

    async def _chunk(self, chunk: TextChunk) -> pb.GenerateStreamChunk:
        return pb.GenerateStreamChunk(
            token_ids=chunk.token_ids,
            prompt_tokens=chunk.num_prompt_tokens,
            completion_tokens=chunk.num_output_tokens,
            cached_tokens=chunk.num_cached_tokens,
            output_logprobs=await self._output_logprobs(chunk),
            input_logprobs=await self._input_logprobs(chunk.prompt),
            index=self._index,
        )

    async def _complete(self, last: TextChunk, finish: Finish) -> pb.GenerateComplete:
        speculated = last.speculated
        complete = pb.GenerateComplete(
            finish_reason=finish.kind,
            prompt_tokens=last.num_prompt_tokens,
            completion_tokens=last.num_output_tokens,
            cached_tokens=last.num_cached_tokens,
            index=self._index,
            spec_accepted_tokens=0 if speculated is None else speculated.num_accepted,
            spec_draft_tokens=0 if speculated is None else speculated.num_drafted,
        )
        if isinstance(finish.matched, int):
            complete.matched_token_id = finish.matched
        elif finish.matched is not None:
            complete.matched_stop_str = finish.matched
        if self._stream:
            complete.output_ids.extend(self._ids)
            return complete
        whole = self._choice.whole
        complete.output_ids.extend(whole.token_ids)
        for name, told in (
            ("output_logprobs", await self._output_logprobs(whole)),
            ("input_logprobs", await self._input_logprobs(whole.prompt)),
        ):
            if told is not None:
                getattr(complete, name).CopyFrom(told)
        return complete

    async def _output_logprobs(self, chunk: TextChunk) -> pb.OutputLogProbs | None:
        asked = self._asked
        if asked is None or chunk.logprobs is None:
            return None
        told = pb.OutputLogProbs(token_ids=chunk.token_ids)
        async for _, _, part in in_pieces(chunk.token_ids, chunk.logprobs, asked.num_per_token):
            told.token_logprobs.extend(part.of_tokens())
            _add_likeliest(told, asked, part)
            if asked.token_ids:
                told.token_ids_logprobs.extend(
                    pb.TopLogProbs(values=row, token_ids=asked.token_ids)
                    for row in part.of_chosen()
                )
        return told

    async def _input_logprobs(self, prompt: ScoredPrompt | None) -> pb.InputLogProbs | None:
        """The first token has no log probability: what comes before it is not told."""
        asked = self._asked
        if asked is None or prompt is None:
            return None
        told = pb.InputLogProbs(token_ids=prompt.token_ids)
        told.token_logprobs.add()
        if asked.num_top:
            told.top_logprobs.add()
        if prompt.logprobs is not None:
            ids = prompt.token_ids[1:]
            async for _, _, part in in_pieces(ids, prompt.logprobs, asked.num_per_token):
                told.token_logprobs.extend(
                    pb.InputTokenLogProb(value=value) for value in part.of_tokens()
                )
                _add_likeliest(told, asked, part)
        return told


def _add_likeliest(
    told: pb.OutputLogProbs | pb.InputLogProbs, asked: LogprobOptions, part: TokenLogprobs
) -> None:
    if asked.num_top:
        told.top_logprobs.extend(
            pb.TopLogProbs(
                values=[value for value, _ in row], token_ids=[token_id for _, token_id in row]
            )
            for row in part.of_likeliest()
        )
