"""How a request for tokens is answered: by one worker, over HTTP or not, or by a pair of them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from starlette.types import Scope

from sapwood.base.errors import NotFound
from sapwood.gateway.exchange import Exchange, OneWorker, Taken, Way
from sapwood.gateway.fleet import Reached
from sapwood.gateway.link import Metadata, TokenAnswer
from sapwood.gateway.pairs import way_of
from sapwood.gateway.plain.by_http import EventTokens
from sapwood.gateway.plain.generate import generate_body
from sapwood.gateway.worker import Worker
from sapwood.schema.request import Generate


@dataclass(frozen=True)
class TokenWay:
    """One request for tokens, or for an embedding, which only workers with a link are asked for.

    model           what the client asks for; "": whatever the workers serve
    max_new_tokens  output tokens at most; None: as the engine likes
    """

    scope: Scope
    request: Generate
    model: str
    max_new_tokens: int | None

    @cached_property
    def body(self) -> bytes:
        return generate_body(self.request, model=self.model, max_new_tokens=self.max_new_tokens)

    async def attempt(self, exchange: Exchange[Any], tried: set[str]) -> Taken[TokenAnswer]:
        fleet = exchange.proxy.fleet
        way: Way[Any]
        if fleet.has_pairs:
            way = way_of(fleet, self.scope, self.body, None)
        else:
            by: Reached = "tokens" if self.request.options.embed is None else "link"
            worker = await exchange.choose("regular", tried, by=by)
            link = worker.link
            if link is not None:
                lora = adapter_of(self.model, worker)

                async def send(metadata: Metadata) -> TokenAnswer:
                    return await link.send(
                        self.request,
                        lora=lora,
                        max_new_tokens=self.max_new_tokens,
                        metadata=metadata,
                    )

                return Taken(worker=worker, answer=await exchange.ask_by_link(worker, send))
            way = OneWorker(self.body, worker)
        taken = await way.attempt(exchange, tried)
        answer = EventTokens(taken.answer, self.request)
        return Taken(worker=taken.worker, answer=answer, peer=taken.peer, merge=taken.merge)


def adapter_of(model: str, worker: Worker) -> str:
    """The adapter that a name stands for, of a worker that is not told the name; "": none.

    Raises NotFound if the worker serves nothing of that name"""
    if not model or not worker.models or model in worker.models:
        return ""
    for base in worker.models:
        if model.startswith(f"{base}:"):
            return model[len(base) + 1 :].strip()
    known = ", ".join(sorted(worker.models))
    raise NotFound(f"the model {model[:200]!r} is not served; the workers have {known}")
