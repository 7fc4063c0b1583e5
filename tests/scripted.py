"""An engine that answers from a script, behind services: for the commands and for batches."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

import msgspec
import tokenizers

from sapwood.frontends.serving.services import Services
from sapwood.schema.output import CacheFlushed, EngineReady, EngineStatus, Finish, RequestOutput
from sapwood.schema.request import Generate
from sapwood.text.generation import TextGenerator
from sapwood.text.template import ChatTemplate, template_source
from sapwood.text.tokenizer import Tokenizer

EOS = "<|im_end|>"


@dataclass
class ScriptedEngine:
    """Answers each request with `reply`, a token per step.

    num_full   so many requests are refused because the queue is full
    die_after  the engine dies when so many requests have been answered
    """

    tokenizer: Tokenizer
    reply: str = "Hi."
    step_s: float = 0.0
    num_full: int = 0
    die_after: int | None = None
    hangs: bool = False
    unavailable_reason: str | None = None
    prompts: list[str] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0

    @property
    def info(self) -> EngineReady:
        return EngineReady(context_length=256, max_total_tokens=4096, page_size=16, notes=[])

    async def generate(self, request: Generate) -> AsyncIterator[RequestOutput]:
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            async for output in self._outputs(request):
                yield output
        finally:
            self.num_open -= 1

    async def _outputs(self, request: Generate) -> AsyncIterator[RequestOutput]:
        def output(token_ids: list[int], finish: Finish | None = None) -> RequestOutput:
            return RequestOutput(
                request_id=request.request_id,
                token_ids=token_ids,
                num_prompt_tokens=len(request.prompt_ids),
                finish=finish,
            )

        if self.num_full > 0:
            self.num_full -= 1
            yield output([], Finish(kind="error", message="the queue is full", status=503))
            return
        if self.die_after is not None and len(self.prompts) >= self.die_after:
            self.unavailable_reason = "the engine process was killed"
            yield output([], Finish(kind="error", message="died", status=503))
            return
        self.prompts.append(self.tokenizer.decode(request.prompt_ids, skip_special_tokens=False))
        limit = request.options.sampling.max_new_tokens
        reply = self.tokenizer.encode(self.reply + EOS)
        for i, token_id in enumerate(reply, start=1):
            await asyncio.sleep(self.step_s)
            if self.hangs:
                await asyncio.Event().wait()
            if limit is not None and i >= limit:
                yield output([token_id], Finish(kind="length"))
                return
            is_last = i == len(reply)
            finish = Finish(kind="stop", matched=token_id) if is_last else None
            yield output([token_id], finish)

    async def abort(self, request_id: str) -> None:
        raise AssertionError(f"{request_id} was aborted by id; closing the stream is enough")

    async def flush_cache(self) -> CacheFlushed:
        return CacheFlushed(call_id="1", done=True, message="flushed")

    async def status(self) -> EngineStatus:
        fields = msgspec.structs.fields(EngineStatus)
        counters = {one.name: 0 for one in fields if one.required}
        return EngineStatus(**counters | {"call_id": "1"})


def byte_tokenizer() -> Tokenizer:
    """One token per byte of UTF-8, then the special tokens."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<|im_start|>", EOS])
    return Tokenizer(backend, special_tokens={"eos_token": EOS})


MakeServices = Callable[..., tuple[Services, ScriptedEngine]]


def scripted_services(
    *, has_template: bool = True, **script: object
) -> tuple[Services, ScriptedEngine]:
    tokenizer = byte_tokenizer()
    engine = ScriptedEngine(tokenizer, **script)  # type: ignore[arg-type]
    template = ChatTemplate(template_source("chatml")) if has_template else None
    services = Services(
        engine=engine,
        generator=TextGenerator(engine, tokenizer),
        tokenizer=tokenizer,
        template=template,
        model_name="scripted",
        model_path="scripted",
        created=0,
        version="0",
    )
    return services, engine
