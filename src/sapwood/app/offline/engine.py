"""SGLang's `Engine` over `sapwood.LLM`: its programs run with another import line."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, NoReturn, TypeVar

import orjson
import safetensors.torch
from torch import Tensor

from sapwood.app.offline.llm import LLM
from sapwood.app.offline.sglang_options import engine_options
from sapwood.base.errors import InvalidRequest, NotFound, UnsupportedFeature
from sapwood.frontends.native import admin
from sapwood.frontends.native.encode import ENCODE_FIELDS, encoded
from sapwood.frontends.native.generate import answers_so_far, in_session, whole_answers
from sapwood.frontends.native.protocol import GENERATE_FIELDS, GenerateRequest
from sapwood.frontends.observability.controls import PROFILE_FIELDS, begin_profile
from sapwood.frontends.serving import control
from sapwood.schema.fields import parse
from sapwood.schema.output import CallDone
from sapwood.schema.request import RecordExperts
from sapwood.schema.weights import (
    JoinUpdateGroup,
    LeaveUpdateGroup,
    ReadWeight,
    ReleaseMemory,
    ResumeMemory,
    UpdateFromDisk,
    UpdateFromGroup,
    UpdateFromTensors,
    WeightOrder,
)

T = TypeVar("T")
R = TypeVar("R")
Answer = dict[str, Any]
Tensors = Sequence[tuple[str, Tensor]]
GROUP = "weight_update_group"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """How a control call ended, with the attributes of SGLang's answers.

    loaded_adapters  of calls about LoRA: the folder of each adapter, by name
    """

    success: bool
    error_message: str = ""
    loaded_adapters: Mapping[str, str] = field(default_factory=dict)


class Engine:
    """One model inside this process, called as SGLang's class of that name.

        with Engine(model_path="smollm2-135m") as engine:
            print(engine.generate("The oak is", {"max_new_tokens": 8})["text"])

    arguments  those of SGLang's ServerArgs, and all options of `sapwood.LLM`

    Answers are dicts as POST /generate and POST /encode send them. What cannot be served raises
    InvalidRequest, which names the argument. Methods may be called from any thread; those whose
    names begin with async_ do not hold up the event loop that awaits them.
    """

    def __init__(self, **arguments: Any) -> None:
        self._log_level = logging.getLogger("sapwood").level
        self.llm = LLM(**engine_options(arguments))
        self._loop: asyncio.AbstractEventLoop | None = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The caller's event loop; if none runs, one for `run_until_complete` until `shutdown`."""
        try:
            return asyncio.get_running_loop()
        except RuntimeError:
            if self._loop is None:
                self._loop = asyncio.new_event_loop()
            return self._loop

    def shutdown(self) -> None:
        """Abort what is open and free the memory. May be called twice."""
        self.llm.close()
        # log_level among the arguments holds as long as the engine.
        logging.getLogger("sapwood").setLevel(self._log_level)
        if self._loop is not None:
            self._loop.close()

    # ---- text --------------------------------------------------------------------------------

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """The answer to one prompt, or a list of them; an iterator of answers so far with `stream`.

        fields  further fields of POST /generate: return_logprob, lora_path, rid, session_params, …
        """
        asked = _generate_request(prompt, sampling_params, input_ids, fields)
        if stream:
            return self.llm.loop.items(self._so_far(asked))
        return self.llm.run(self._answers(asked))

    async def async_generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Any = None,
        input_ids: Any = None,
        *,
        stream: bool = False,
        **fields: Any,
    ) -> Any:
        """`generate` for an asyncio program; with `stream` an asynchronous iterator."""
        asked = _generate_request(prompt, sampling_params, input_ids, fields)
        if stream:
            return self.llm.loop.items_async(self._so_far(asked))
        return await self.llm.loop.run_async(self._answers(asked))

    async def _answers(self, asked: GenerateRequest) -> Any:
        """Each prompt as soon as there is room for it: any number may be given."""
        started_s = self.llm.services.clock.now_s()
        batch = await in_session(asked, self.llm.services)

        async def of(place: int) -> list[Answer]:
            async with self.llm.room:
                one = replace(batch, requests=[batch.requests[place]])
                return await whole_answers(self.llm.services, one, started_s)

        tasks = [asyncio.create_task(of(place)) for place in range(len(batch.requests))]
        try:
            by_prompt = await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        answers = [_as_objects(answer) for answers in by_prompt for answer in answers]
        return answers if batch.is_list else answers[0]

    async def _so_far(self, asked: GenerateRequest) -> AsyncGenerator[Answer, None]:
        services = self.llm.services
        started_s = services.clock.now_s()
        batch = await in_session(asked, services)
        async with aclosing(answers_so_far(services, batch, started_s)) as answers:
            async for answer in answers:
                yield _as_objects(answer)

    def open_session(self, capacity_of_str_len: int = 0, session_id: str | None = None) -> str:
        """Returns the id, which requests give in session_params. The capacity changes nothing."""
        return self.llm.run(_call(self.llm.services.sessions.open, session_id))

    def close_session(self, session_id: str) -> None:
        self.llm.run(_call(self.llm.services.sessions.close, session_id))

    # ---- numbers -----------------------------------------------------------------------------

    def encode(
        self, prompt: str | Sequence[str], *, dimensions: int | None = None, **fields: Any
    ) -> Any:
        """{"embedding", "meta_info"} of a text, or a list of them; fields: those of POST /encode"""
        return self.llm.run(self._encoded(prompt, dimensions=dimensions, **fields))

    async def async_encode(
        self, prompt: str | Sequence[str], *, dimensions: int | None = None, **fields: Any
    ) -> Any:
        answers = self._encoded(prompt, dimensions=dimensions, **fields)
        return await self.llm.loop.run_async(answers)

    def rerank(self, prompt: Sequence[Sequence[str]]) -> Any:
        """What a cross-encoder says of each pair of query and document, as `encode` tells it."""
        return self.llm.run(self._encoded(prompt, is_cross_encoder_request=True))

    async def _encoded(self, prompt: Any, **fields: Any) -> Any:
        given = {"text": _plain(prompt), **fields}
        services = self.llm.services
        task = "embed" if services.pooling is None else services.pooling.task
        return await encoded(parse(given, ENCODE_FIELDS), services, task, room=self.llm.room)

    def score(
        self,
        query: str | Sequence[int] | None = None,
        items: Any = None,
        label_token_ids: Sequence[int] | None = None,
        apply_softmax: bool = False,
        item_first: bool = False,
    ) -> list[list[float]]:
        """How likely each label follows the query and an item: a list per item."""
        if query is None or items is None:
            raise InvalidRequest("query and items are required", param="query")
        return self.llm.score(
            query,
            items,
            list(label_token_ids or ()),
            apply_softmax=apply_softmax,
            item_first=item_first,
        )

    async def async_score(self, *arguments: Any, **named: Any) -> list[list[float]]:
        return await asyncio.to_thread(self.score, *arguments, **named)

    # ---- weights -----------------------------------------------------------------------------

    def update_weights_from_disk(
        self, model_path: str, load_format: str | None = None
    ) -> tuple[bool, str, int]:
        """(whether it succeeded, what was done or why not, number of paused requests)"""
        done = self._order(UpdateFromDisk(path=model_path, load_format=load_format or ""))
        paused = self.llm.services.served.is_paused
        return done.done, done.message, len(self._open_ids()) if paused else 0

    def update_weights_from_tensor(
        self,
        named_tensors: Any,
        load_format: str | None = None,
        flush_cache: bool = True,
    ) -> tuple[bool, str]:
        """named_tensors: (name, tensor) pairs; with load_format flattened_bucket what SGLang's
        serializer has made of a bucket, one entry per rank"""
        if load_format == "flattened_bucket":
            parts = [_bytes_of(part) for part in named_tensors]
            order = UpdateFromTensors(parts=parts, form="flattened_bucket")
        elif load_format in (None, "direct"):
            data = _saved(dict(named_tensors))
            order = UpdateFromTensors(parts=[data], form="safetensors")
        else:
            raise InvalidRequest(
                f"load_format is {load_format!r} but must be direct or flattened_bucket: weights "
                "are placed without code of the caller's",
                param="load_format",
            )
        return _told(self._order(order, flush_cache=flush_cache))

    def init_weights_update_group(
        self,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str = GROUP,
        backend: str = "nccl",
    ) -> tuple[bool, str]:
        order = JoinUpdateGroup(
            group_name=group_name,
            master_address=master_address,
            master_port=int(master_port),
            rank=rank_offset,
            world_size=world_size,
            backend=backend,
        )
        return _told(self._order(order))

    def destroy_weights_update_group(self, group_name: str = GROUP) -> tuple[bool, str]:
        return _told(self._order(LeaveUpdateGroup(group_name=group_name)))

    def update_weights_from_distributed(
        self,
        names: Sequence[str],
        dtypes: Sequence[Any],
        shapes: Sequence[Sequence[int]],
        group_name: str = GROUP,
        flush_cache: bool = True,
        load_format: str | None = None,
    ) -> tuple[bool, str]:
        """dtypes: their names, or torch's objects"""
        if load_format not in (None, "flattened_bucket"):
            raise InvalidRequest(
                f"load_format is {load_format!r} but may be flattened_bucket", param="load_format"
            )
        order = UpdateFromGroup(
            group_name=group_name,
            names=list(names),
            dtypes=[str(dtype) for dtype in dtypes],
            shapes=[list(shape) for shape in shapes],
            is_flattened=load_format is not None,
        )
        return _told(self._order(order, flush_cache=flush_cache))

    def update_weights_from_ipc(
        self, zmq_handles: Mapping[str, str], flush_cache: bool = True
    ) -> NoReturn:
        raise UnsupportedFeature(control.NO_IPC)

    def get_weights_by_name(self, name: str, truncate_size: int = 100) -> Any:
        """The first rows of a weight, by its name in the checkpoint."""
        replicas = self.llm.services.replicas
        done = self._order(
            ReadWeight(name=name, most=truncate_size), engine=replicas[0] if replicas else None
        )
        if not done.done:
            raise InvalidRequest(done.message, param="name")
        return json.loads(done.message)

    def pause_generation(self, mode: str = "abort") -> None:
        """mode: abort, retract or in_place"""
        _checked(self.llm.run(control.pause(self.llm.services, mode)))

    def continue_generation(self) -> None:
        _checked(self.llm.run(control.go_on(self.llm.services)))

    def release_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        """tags: kv_cache, weights, cuda_graph; None: all. InvalidRequest if it cannot be."""
        _checked(self._order(ReleaseMemory(tags=list(tags or ()))))

    def resume_memory_occupation(self, tags: Sequence[str] | None = None) -> None:
        _checked(self._order(ResumeMemory(tags=list(tags or ()))))

    def _order(self, order: WeightOrder, **how: Any) -> CallDone:
        return self.llm.run(control.order_weights(self.llm.services, order, **how))

    # ---- adapters ----------------------------------------------------------------------------

    def load_lora_adapter(self, lora_name: str, lora_path: str, pinned: bool = False) -> Outcome:
        return self._adapters(
            lambda: self.llm.load_lora_adapter(lora_name, lora_path, pinned=pinned)
        )

    def load_lora_adapter_from_tensors(
        self, lora_name: str, tensors: Tensors | Mapping[str, Tensor], config_dict: dict[str, Any]
    ) -> Outcome:
        """tensors: PEFT's; config_dict: what adapter_config.json has"""
        named = dict(tensors)
        return self._adapters(
            lambda: self.llm.load_lora_adapter_from_tensors(lora_name, named, config_dict)
        )

    def unload_lora_adapter(self, lora_name: str) -> Outcome:
        return self._adapters(lambda: self.llm.unload_lora_adapter(lora_name))

    def _adapters(self, change: Any) -> Outcome:
        why_not = ""
        try:
            change()
        except (InvalidRequest, NotFound) as error:
            why_not = error.message
        registry = self.llm.services.adapters
        loaded = (
            {} if registry is None else {name: registry.paths[name] for name in registry.loaded}
        )
        return Outcome(success=not why_not, error_message=why_not, loaded_adapters=loaded)

    # ---- the engine --------------------------------------------------------------------------

    def flush_cache(self) -> Outcome:
        """Forget all cached prefixes; success is False while requests are open."""
        return Outcome(success=self.llm.flush_cache())

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the open requests whose ids begin with `rid`, or all of them."""
        if not rid and not abort_all:
            raise InvalidRequest("rid is empty; name a request, or set abort_all", param="rid")
        self.llm.run(self._abort("" if abort_all else rid))

    async def _abort(self, prefix: str) -> None:
        generator = self.llm.services.generator
        for request_id in generator.open_ids(prefix):
            await generator.abort(request_id)

    def _open_ids(self) -> list[str]:
        return self.llm.services.generator.open_ids("")

    def get_server_info(self) -> dict[str, Any]:
        """The resolved options, their reasons, and the engine's counters."""
        return dict(self.llm.run(admin.server_info(self.llm.services)))

    def start_profile(self, **fields: Any) -> None:
        """fields: those of POST /start_profile"""
        asked = parse(fields, PROFILE_FIELDS)
        _checked(self.llm.run(begin_profile(asked, self.llm.services)))

    def stop_profile(self) -> None:
        _checked(self.llm.run(self.llm.services.engine.stop_profile()))

    def start_expert_distribution_record(self) -> None:
        self._record("start")

    def stop_expert_distribution_record(self) -> None:
        self._record("stop")

    def dump_expert_distribution_record(self) -> None:
        self._record("dump")

    def _record(self, action: Any) -> None:
        order = RecordExperts(call_id="", action=action)
        _checked(self.llm.run(self.llm.services.engine.record_experts(order)))

    def freeze_gc(self) -> None:
        """Exempt all objects that exist now from garbage collection."""
        _checked(self.llm.run(self.llm.services.engine.freeze_gc()))

    def collective_rpc(self, method: str, **arguments: Any) -> NoReturn:
        """Refused: SGLang calls any method of its scheduler by that name."""
        raise UnsupportedFeature(
            f"collective_rpc({method!r}) names a method of SGLang's scheduler; sapwood's engine "
            "has none that a program may call by name",
            param="method",
        )

    def save_sharded_model(self, **arguments: Any) -> NoReturn:
        raise UnsupportedFeature(
            "save_sharded_model writes the layers as SGLang keeps them in memory; every rank here "
            "reads its part of the ordinary checkpoint, so serve that"
        )

    def save_remote_model(self, **arguments: Any) -> NoReturn:
        raise UnsupportedFeature(
            "save_remote_model writes to a store that SGLang's loaders read; publish the "
            "checkpoint as a hub repository, and serve that"
        )


def _generate_request(
    prompt: Any, sampling: Any, ids: Any, fields: Mapping[str, Any]
) -> GenerateRequest:
    given = {"text": prompt, "sampling_params": sampling, "input_ids": ids, **fields}
    return parse({name: _plain(value) for name, value in given.items()}, GENERATE_FIELDS)


async def _call(function: Callable[[T], R], argument: T) -> R:
    """On the engine's event loop, where the state of services lives."""
    return function(argument)


def _plain(value: Any) -> Any:
    """Arrays and tensors as lists of numbers, pictures and files' bytes as base64; everything else
    as it is."""
    if hasattr(value, "save") and hasattr(value, "getbands"):
        file = io.BytesIO()
        value.save(file, "PNG")
        value = file.getvalue()
    if isinstance(value, bytes):
        return base64.b64encode(value).decode()
    if hasattr(value, "tolist"):
        return value.tolist()
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _as_objects(answer: Answer) -> Answer:
    """The answer without pieces that are JSON already."""
    found: Answer = orjson.loads(orjson.dumps(answer))
    return found


def _told(done: CallDone) -> tuple[bool, str]:
    return done.done, done.message


def _checked(done: CallDone) -> None:
    if not done.done:
        raise InvalidRequest(done.message)


def _saved(tensors: Mapping[str, Tensor]) -> bytes:
    """Of tensors that share memory, each gets its own: the format wants it so."""
    seen: set[int] = set()
    apart: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        one = tensor.detach().cpu().contiguous()
        address = one.untyped_storage().data_ptr()
        apart[name] = one.clone() if address in seen else one
        seen.add(address)
    return safetensors.torch.save(apart)


def _bytes_of(part: Any) -> bytes:
    if isinstance(part, str):
        return base64.b64decode(part)
    if isinstance(part, bytes):
        return part
    raise InvalidRequest("a flattened bucket comes as its serializer's text or bytes")
