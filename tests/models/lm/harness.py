"""Run a decoder without an engine: pages handed out in a row, batches built from lists."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.distributed.pipe import Pipe
from sapwood.executor.recorded import record_steps
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import is_8_bit, kv_cache_shape
from sapwood.kernels.torch_ops.rows import copy_rows
from sapwood.layers.build import Build, Groups
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.assign import load_weights
from sapwood.models.registry import read_decoder
from sapwood.schema.cache import RECURRENT
from sapwood.schema.stage import Stage

CPU = torch.device("cpu")


@dataclass(frozen=True)
class NewTokens:
    """What one request adds in a step.

    token_ids     the new tokens
    num_computed  tokens of the request whose KV is in `pages` already
    pages         enough of them for num_computed + len(token_ids) tokens
    slot          of its states
    first_position  as in RowStart
    """

    token_ids: Sequence[int]
    num_computed: int
    pages: Sequence[int]
    slot: int = 0
    first_position: int = 0


def make_attention_batch(requests: Sequence[NewTokens], *, num_decodes: int) -> AttentionBatch:
    """Unused entries of the page table are 0."""
    query_lens = tuple(len(request.token_ids) for request in requests)
    context_lens = tuple(r.num_computed + len(r.token_ids) for r in requests)
    widest = max(len(request.pages) for request in requests)
    table = [[*request.pages, *[0] * (widest - len(request.pages))] for request in requests]
    return AttentionBatch(
        page_table=torch.tensor(table, dtype=torch.int32),
        query_start=torch.tensor([0, *accumulate(query_lens)], dtype=torch.int32),
        context_len=torch.tensor(context_lens, dtype=torch.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=num_decodes,
    )


def make_batch(
    requests: Sequence[NewTokens],
    kv_caches: Sequence[tuple[Tensor, ...]],
    *,
    page_size: int | None = None,
    layers_with_states: Sequence[int] = (),
) -> ForwardBatch:
    """Logits are wanted of every new token. Requests with one new token count as decodes while
    they come first. page_size: None: that of the first layer's keys."""
    page_size = page_size or kv_caches[0][0].shape[2]
    num_decodes = 0
    while num_decodes < len(requests) and len(requests[num_decodes].token_ids) == 1:
        num_decodes += 1
    token_ids: list[int] = []
    positions: list[int] = []
    write_index: list[int] = []
    for request in requests:
        for offset, token_id in enumerate(request.token_ids):
            position = request.num_computed + offset
            token_ids.append(token_id)
            positions.append(request.first_position + position)
            page = request.pages[position // page_size]
            write_index.append(page * page_size + position % page_size)
    inputs = CacheInputs(
        write_index=torch.tensor(write_index),
        attention=make_attention_batch(requests, num_decodes=num_decodes),
        slots=torch.tensor([request.slot for request in requests]),
    )
    return ForwardBatch(
        token_ids=torch.tensor(token_ids),
        positions=torch.tensor(positions),
        write_index=inputs.write_index,
        attention=inputs.attention,
        groups=[inputs] if layers_with_states else (),
        group_of_layer=(0,) * len(kv_caches) if layers_with_states else (),
        kv_caches=kv_caches,
        logits_index=torch.arange(len(token_ids)),
    )


def make_kv_caches(
    config: DecoderConfig,
    *,
    num_pages: int,
    page_size: int,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
    state_dtype: torch.dtype = torch.float32,
) -> list[tuple[Tensor, ...]]:
    """Filled with NaN, so that whoever reads what no token of the request wrote is found out. There
    are as many slots of states as pages."""
    size = 1 if group is None else group.size

    def full_of_nan(num_kv_heads: int, width: int) -> Tensor:
        shape = kv_cache_shape(num_pages, max(1, num_kv_heads // size), page_size, width, dtype)
        if is_8_bit(dtype):  # so are its scales then
            return torch.full(shape, 255, dtype=torch.uint8).view(dtype)
        return torch.full(shape, torch.nan, dtype=dtype)

    states = {
        layer: tuple(
            torch.full(
                (num_pages, *tensor.of_rank(size).shape),
                torch.nan,
                dtype=torch.float32 if tensor.dtype == RECURRENT else state_dtype,
            )
            for tensor in kept.tensors.values()
        )
        for kept in config.states
        for layer in kept.layers
    }
    caches = []
    for layer in range(1 + max([config.num_layers - 1, *states])):
        heads = None if layer in states else config.heads_of(layer)
        if heads is None or heads.source is not None:
            caches.append(states.get(layer, ()))
        elif config.latent is not None:
            widths = [config.latent.row]
            if layer in config.index_layers:
                widths.append(config.index_width)
            for _ in range(config.attentions_per_layer):
                caches.append(tuple(full_of_nan(1, width) for width in widths))
        else:
            kept = (heads.num_kv_heads, heads.head_dim)
            caches.append((full_of_nan(*kept), full_of_nan(*kept)))
    return caches


def make_decoder(
    hf_config: Mapping[str, Any],
    weights: Mapping[str, Tensor | LinearPart],
    kernels: Kernels,
    *,
    dtype: torch.dtype = torch.float32,
    group: Group | None = None,
    spreads_experts: bool = False,
    scheme: LinearScheme = DENSE,
    context_length: int | None = None,
    stage: Stage | None = None,
    pipe: Pipe | None = None,
) -> Decoder:
    """A loaded and packed decoder, or one stage of it; `spreads_experts` over the ranks of the
    group, instead of cutting each; `context_length`: None for the config's."""
    group = group or Group()
    groups = Groups(tp=group, attention=group, expert=Group() if spreads_experts else None)
    build = Build(kernels=kernels, device=CPU, dtype=dtype, groups=groups, scheme=scheme)
    config = read_decoder(hf_config)
    if context_length is not None:
        config = config.for_context(context_length)
    model = Decoder.of(config, build, stage, pipe)
    named = ((model.checkpoint_name(name), one) for name, one in weights.items())
    load_weights(model, ((name, one) for name, one in named if not model.is_elsewhere(name)))
    model.finalize()
    return model


class Session:
    """One decoder, its cache, and requests that grow step by step."""

    def __init__(
        self,
        model: Decoder,
        *,
        page_size: int = 8,
        num_pages: int = 64,
        dtype: torch.dtype = torch.float32,
        group: Group | None = None,
        state_dtype: torch.dtype = torch.float32,
        recorded_by: Kernels | None = None,
    ) -> None:
        """`dtype`: of the KV cache; `state_dtype`: of activations; `recorded_by`: run steps as
        these kernels record them, not op by op."""
        self._model = model
        self._page_size = page_size
        self._kv_caches = make_kv_caches(
            model.config,
            num_pages=num_pages,
            page_size=page_size,
            dtype=dtype,
            group=group,
            state_dtype=state_dtype,
        )
        self._recorded = None
        if recorded_by is not None:
            choice = record_steps(
                model,
                recorded_by,
                self._kv_caches,
                group_of_layer=(0,) * len(self._kv_caches),
                enabled=True,
            )
            assert choice.is_recorded, choice.why
            self._recorded = choice.steps
        # Handed out from the end, so that a request's pages are in no convenient order.
        self._free = list(range(1, num_pages))
        self.pages: dict[str, list[int]] = {}
        self.slots: dict[str, int] = {}
        self.num_computed: dict[str, int] = {}
        # Requests that are rotated as short texts where the length matters.
        self.short: set[str] = set()

    @property
    def switch_length(self) -> int | None:
        return self._model.config.switch_length

    def share(self, source: str, target: str, num_tokens: int) -> None:
        """Start request `target` on the first `num_tokens` (whole pages) of `source`. With states,
        these must be all that `source` has computed."""
        assert num_tokens % self._page_size == 0
        for layer in self._model.config.layers_with_states:
            assert self.num_computed[source] == num_tokens
            rows = torch.tensor([[self._slot(source)], [self._slot(target)]])
            for states in self._kv_caches[layer]:
                copy_rows(states, *rows)
        self.pages[target] = self.pages[source][: num_tokens // self._page_size]
        self.num_computed[target] = num_tokens

    def step(self, new: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
        """One forward pass: request -> its new tokens; returns request -> logits [new, vocab]."""
        requests = []
        for name, token_ids in new.items():
            computed = self.num_computed.setdefault(name, 0)
            pages = self.pages.setdefault(name, [])
            while len(pages) * self._page_size < computed + len(token_ids):
                pages.append(self._free.pop())
            first = 0 if name in self.short else self.switch_length or 0
            requests.append(NewTokens(token_ids, computed, tuple(pages), self._slot(name), first))
            self.num_computed[name] += len(token_ids)
        batch = make_batch(
            requests,
            self._kv_caches,
            page_size=self._page_size,
            layers_with_states=self._model.config.layers_with_states,
        )
        logits = self._compute(batch)
        sizes = [len(token_ids) for token_ids in new.values()]
        return dict(zip(new, torch.split(logits, sizes), strict=True))

    def _slot(self, name: str) -> int:
        return self.slots.setdefault(name, len(self.slots))

    def _compute(self, batch: ForwardBatch) -> Tensor:
        if self._recorded is None:
            return self._model.compute(batch)
        logits = self._recorded.replay(batch)
        assert logits is not None
        return logits.clone()  # the next replay overwrites them

    def in_chunks(self, name: str, token_ids: Sequence[int], size: int) -> Tensor:
        """The request's tokens, `size` per step; the logits of all of them."""
        chunks = [token_ids[start : start + size] for start in range(0, len(token_ids), size)]
        return torch.cat([self.step({name: chunk})[name] for chunk in chunks])
