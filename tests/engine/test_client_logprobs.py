"""A slow reader gets the log probabilities of all tokens that became one output."""

from __future__ import annotations

import asyncio
import struct

from sapwood.base.channel import CallbackSender
from sapwood.engine.client import AsyncEngineClient
from sapwood.schema.logprobs import LogprobOptions, TokenLogprobs
from sapwood.schema.output import EngineReady, Finish, RequestOutput, StepOutputs
from sapwood.schema.request import Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams


def packed(*values: float) -> TokenLogprobs:
    return TokenLogprobs(tokens=struct.pack(f"<{len(values)}f", *values))


def test_they_are_joined_with_their_tokens() -> None:
    async def main() -> list[RequestOutput]:
        client = AsyncEngineClient(CallbackSender(lambda _: None))
        client.deliver(EngineReady(context_length=9, max_total_tokens=9, page_size=1, notes=[]))
        request = Generate(
            request_id="r",
            prompt_ids=[1, 2],
            options=RequestOptions(
                sampling=SamplingParams(), logprobs=LogprobOptions(prompt_start=0)
            ),
        )
        outputs = client.generate(request)
        first = asyncio.ensure_future(anext(outputs))
        await asyncio.sleep(0)
        for index in range(3):
            output = RequestOutput(
                request_id="r",
                token_ids=[index],
                num_prompt_tokens=2,
                logprobs=packed(-float(index)),
                prompt_logprobs=packed(-9.0) if index == 0 else None,
                finish=Finish(kind="length") if index == 2 else None,
            )
            client.deliver(StepOutputs([output]))
        return [await first]

    [output] = asyncio.run(main())
    assert output.token_ids == [0, 1, 2]
    assert output.logprobs is not None
    assert output.logprobs.of_tokens() == (0.0, -1.0, -2.0)
    assert output.prompt_logprobs == packed(-9.0)
    assert output.finish == Finish(kind="length")
