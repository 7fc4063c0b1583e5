"""A worker: an engine as the gateway sees it."""

from __future__ import annotations

import asyncio
import math
import ssl
from enum import Enum
from typing import Any, Literal
from uuid import NAMESPACE_URL, uuid5

import msgspec

from sapwood.base.errors import InvalidRequest
from sapwood.gateway.breaker import Breaker, BreakerLimits
from sapwood.gateway.client import Answer, NotConnected, Origin, Pool
from sapwood.gateway.link import Link
from sapwood.gateway.model_parts import ModelParts
from sapwood.schema.config.gateway import GatewayConfig

Runtime = Literal["sapwood", "sglang", "vllm", "external"]
WorkerType = Literal["regular", "prefill", "decode"]

EXTERNAL_HEALTH_PATH = "/v1/models"
MAX_LABELS = 64


class WorkerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What POST /workers says of a worker.

    url       where it listens
    api_key   sent to it instead of the client's key
    model_id  the model that it serves; None: what its /v1/models says
    priority  workers with a larger number are used first; others only while none of them can be
    cost      its number of open requests counts so many times
    worker_type     "prefill" reads prompts, and "decode" generates from what that has read
    bootstrap_port  where a prefill worker is asked for keys and values; None: the engines' default
    runtime   "external": a service that only has OpenAI's paths, asked for /v1/models as its health
    tokenizer_path, chat_template, tool_parser, reasoning_parser
              by these the gateway makes the chats of its model (`gateway/model_parts.py`)
    labels    shown; two of them say where KV events come from (`gateway/kv_watch.py`)
    health_…  None: as the gateway's options say
    """

    url: str
    api_key: str | None = None
    model_id: str | None = None
    priority: int = 50
    cost: float = 1.0
    worker_type: WorkerType = "regular"
    bootstrap_port: int | None = None
    runtime: Runtime = "sapwood"
    tokenizer_path: str | None = None
    chat_template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None
    labels: dict[str, str] = {}
    health_check_timeout_secs: float | None = None
    health_check_interval_secs: float | None = None
    health_success_threshold: int | None = None
    health_failure_threshold: int | None = None
    disable_health_check: bool | None = None

    def check(self) -> None:
        """InvalidRequest if a value is out of its range."""
        if Origin.parse(self.url).is_rpc:
            self._check_rpc()
        for name in ("cost", "health_check_timeout_secs", "health_check_interval_secs"):
            value = getattr(self, name)
            if value is not None and not (0 < value < math.inf):
                raise InvalidRequest(f"{name} is {value} but must be a number > 0", param=name)
        for name in ("health_success_threshold", "health_failure_threshold"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InvalidRequest(f"{name} is {value} but must be >= 1", param=name)
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable()):
            raise InvalidRequest("api_key must be printable ASCII", param="api_key")
        if self.worker_type != "regular" and self.runtime in ("vllm", "external"):
            raise InvalidRequest(
                f"a worker of the type {self.worker_type} must be an engine of SGLang's, not "
                f"{self.runtime}",
                param="runtime",
            )
        if self.bootstrap_port is not None and self.worker_type != "prefill":
            raise InvalidRequest(
                "only a worker of the type prefill has a bootstrap_port", param="bootstrap_port"
            )
        if self.bootstrap_port is not None and not 0 < self.bootstrap_port < 65536:
            raise InvalidRequest(
                f"bootstrap_port is {self.bootstrap_port} but must be from 1 to 65535",
                param="bootstrap_port",
            )
        if len(self.labels) > MAX_LABELS:
            raise InvalidRequest(f"a worker has at most {MAX_LABELS} labels", param="labels")
        self._check_parts()

    @property
    def parts(self) -> ModelParts | None:
        """By what the gateway makes the chats of the worker's model; None: the worker says none."""
        if self.tokenizer_path is None:
            return None
        return ModelParts(
            tokenizer_path=self.tokenizer_path,
            chat_template=self.chat_template,
            tool_parser=self.tool_parser,
            reasoning_parser=self.reasoning_parser,
        )

    def _check_parts(self) -> None:
        if self.parts is None:
            for name in ("chat_template", "tool_parser", "reasoning_parser"):
                if getattr(self, name) is not None:
                    raise InvalidRequest(
                        f"{name} needs the model's tokenizer at the gateway; give tokenizer_path",
                        param=name,
                    )
            return
        self.parts.check()
        if self.parts.makes_chats and self.runtime in ("vllm", "external"):
            raise InvalidRequest(
                f"chats are made at the gateway of an engine's /generate, which {self.runtime} has "
                "not; leave tool_parser and reasoning_parser out",
                param="runtime",
            )

    def _check_rpc(self) -> None:
        if self.worker_type != "regular":
            raise InvalidRequest(
                f"a worker of the type {self.worker_type} cannot be reached by gRPC: pairs of "
                "workers find each other by HTTP; give its address by http://",
                param="worker_type",
            )
        if self.runtime not in ("sapwood", "sglang"):
            raise InvalidRequest(
                f"the gRPC service is that of sapwood and sglang, not of {self.runtime}; give "
                "another runtime, or the worker's address by http://",
                param="runtime",
            )


def first_workers(config: GatewayConfig) -> tuple[WorkerSpec, ...]:
    """The workers that the options name."""
    key = config.worker_api_key
    regular = [WorkerSpec(url=url, api_key=key) for url in config.urls]
    prefill = [
        WorkerSpec(
            url=url, api_key=key, worker_type="prefill", bootstrap_port=port, runtime="sglang"
        )
        for url, port in config.prefill_workers
    ]
    decode = [
        WorkerSpec(url=url, api_key=key, worker_type="decode", runtime="sglang")
        for url in config.decode_urls
    ]
    return (*regular, *prefill, *decode)


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    UNHEALTHY = "unhealthy"
    FAILED = "failed"
    DRAINING = "draining"
    REMOVED = "removed"


_NEXT: dict[WorkerState, set[WorkerState]] = {
    WorkerState.STARTING: {WorkerState.READY, WorkerState.FAILED, WorkerState.DRAINING},
    WorkerState.READY: {WorkerState.UNHEALTHY, WorkerState.DRAINING},
    WorkerState.UNHEALTHY: {WorkerState.READY, WorkerState.DRAINING},
    WorkerState.FAILED: {WorkerState.DRAINING},
    WorkerState.DRAINING: {WorkerState.REMOVED},
    WorkerState.REMOVED: set(),
}


class Worker:
    """One worker's state. Its id follows from its address, so it is the same after a restart.

    link       how it is reached, if that is not HTTP
    cards      what its /v1/models says of the models that it serves
    last_error why it is not ready, or why a request failed last
    """

    def __init__(
        self,
        spec: WorkerSpec,
        *,
        breaker_limits: BreakerLimits,
        connect_timeout_s: float,
        tls: ssl.SSLContext | None = None,
        link: Link | None = None,
    ) -> None:
        self.link = link
        self.spec = spec
        self.id = worker_id(spec.url)
        self.url = spec.url.rstrip("/")
        self.origin = Origin.parse(spec.url)
        self.host = self.origin.host_header
        self.pool = Pool(self.origin, connect_timeout_s=connect_timeout_s, tls=tls)
        self.breaker = Breaker(breaker_limits)
        self.state = WorkerState.STARTING
        self.cards: tuple[dict[str, Any], ...] = ()
        self.models: frozenset[str] = frozenset()
        self.last_error: str | None = None
        self.num_open = 0
        self.num_requests = 0
        self.idle = asyncio.Event()
        self.idle.set()
        self._without_head: set[Answer] = set()
        self.learn([])

    @property
    def load(self) -> float:
        return self.num_open * self.spec.cost

    def learn(self, cards: list[dict[str, Any]]) -> None:
        """The worker has said what it serves; a model_id in the spec counts more."""
        if self.spec.model_id is not None:
            cards = [_named(self.spec.model_id, cards)]
        self.cards = tuple(cards)
        self.models = frozenset(str(card["id"]) for card in cards)

    @property
    def base_models(self) -> frozenset[str]:
        """Its models without the adapters of models."""
        return frozenset(str(card["id"]) for card in self.cards if not card.get("parent"))

    def move_to(self, state: WorkerState) -> None:
        if state not in _NEXT[self.state]:
            raise RuntimeError(f"worker {self.url}: {self.state} -> {state}")
        self.state = state

    @property
    def precedence(self) -> int:
        """Of workers with the same priority those with the greatest are used, as in SGLang."""
        return 2 if self.spec.runtime == "external" else int(self.link is not None)

    def serves_model(self, model: str) -> bool:
        """Whether it may serve the model, or an adapter; one with a link names no adapters."""
        if not self.models or model in self.models:
            return True
        return self.link is not None and any(model.startswith(f"{one}:") for one in self.models)

    def serves_path(self, path: str) -> bool:
        if self.spec.runtime == "vllm" and path == "/generate":
            return False
        return self.spec.runtime != "external" or path.startswith("/v1/")

    def admits(self, now_s: float) -> bool:
        return self.state is WorkerState.READY and self.breaker.admits(now_s)

    def begin(self) -> None:
        """A request is sent to the worker; `end` must follow."""
        self.num_open += 1
        self.num_requests += 1
        self.idle.clear()
        self.breaker.sent()

    def end(self) -> None:
        self.num_open -= 1
        if self.num_open == 0:
            self.idle.set()

    async def ask(self, head: bytes, body: bytes) -> Answer:
        """Send a request and wait for its answer's head; WorkerFailure if none comes."""
        sent: list[Answer] = []

        def on_sent(answer: Answer) -> None:
            sent.append(answer)
            self._without_head.add(answer)

        try:
            return await self.pool.ask(head, body, on_sent=on_sent)
        finally:
            self._without_head.difference_update(sent)

    def give_up_unanswered(self, reason: str) -> None:
        """Requests that have no answer yet fail now, so that they can go elsewhere."""
        for answer in list(self._without_head):
            answer.fail(NotConnected(reason))
        if self.link is not None:
            self.link.give_up_unanswered(reason)

    async def close(self) -> None:
        self.pool.close()
        if self.link is not None:
            await self.link.close()


def worker_id(url: str) -> str:
    return str(uuid5(NAMESPACE_URL, url.rstrip("/")))


def _named(model_id: str, cards: list[dict[str, Any]]) -> dict[str, Any]:
    """The card of a model that the spec names, with the context that the worker tells of it."""
    card = {"id": model_id, "object": "model", "owned_by": "sapwood"}
    bases = [one for one in cards if not one.get("parent")]
    own = [one for one in bases if one["id"] == model_id] or bases
    if len(own) == 1 and "max_model_len" in own[0]:
        card["max_model_len"] = own[0]["max_model_len"]
    return card
