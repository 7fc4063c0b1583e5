"""Which steps are captured, and the memory in which captured steps find their inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.executor.cache_inputs import GroupPlace, SparePlaces, inputs_of_groups
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CapturePlan:
    """The sizes to capture.

    decode       numbers of requests in ascending order; may be empty
    prefill      numbers of tokens in ascending order; may be empty
    max_pages    pages of one request at most
    spares       pages and a slot that no request has
    has_adapters  whether requests may have adapters
    of_groups, group_of_layer  as CachePlaces has them
    shares_pages  whether attention may read pages once for several requests
    """

    decode: tuple[int, ...]
    prefill: tuple[int, ...]
    max_pages: int
    page_size: int
    spares: SparePlaces
    vocab_size: int
    dtype: torch.dtype
    device: torch.device
    has_adapters: bool = False
    of_groups: tuple[GroupPlace, ...] = ()
    group_of_layer: tuple[int, ...] = ()
    shares_pages: bool = True

    @property
    def most_tokens(self) -> int:
        return max((*self.decode, *self.prefill))

    @property
    def logits_bytes(self) -> int:
        """Bytes of the logits of decodes, twice: later computations take as much again at most."""
        return 2 * 4 * max((*self.decode, 0)) * self.vocab_size


@dataclass(frozen=True, slots=True)
class _Table:
    """A page table of captured steps.

    spare_page   a page that no request has
    nowhere      [most_tokens] int64: the place of tokens of nobody, on that page
    write_index  [most_tokens] int64
    pages        [most requests, max_pages] int32; entries after a request's pages are old ones
    """

    spare_page: int
    nowhere: Tensor
    write_index: Tensor
    pages: Tensor

    @classmethod
    def of(cls, plan: CapturePlan, spare_page: int, num_requests: int) -> _Table:
        device, place = plan.device, spare_page * plan.page_size
        nowhere = torch.full((plan.most_tokens,), place, dtype=torch.int64, device=device)
        shape = (num_requests, plan.max_pages)
        pages = torch.full(shape, spare_page, dtype=torch.int32, device=device)
        return cls(spare_page, nowhere, nowhere.clone(), pages)

    def take_requests(self, attention: AttentionBatch, size: int) -> None:
        num, width = attention.page_table.shape
        self.pages[:num, :width].copy_(attention.page_table)
        if num < size:
            self.pages[num:size, :1].fill_(self.spare_page)


class StepMemory:
    """The fixed memory of captured steps, for the most tokens of any.

    token_ids, positions  [most_tokens] int64
    slots        [most requests] int64; None: there are no states
    context_len  [most requests] int32
    logits       [most requests, vocab] fp32: the result of a step of decodes
    """

    def __init__(self, plan: CapturePlan) -> None:
        num_tokens, num_requests = plan.most_tokens, max((*plan.decode, 1))
        device = plan.device
        self._plan = plan
        self._no_token = torch.zeros(num_tokens, dtype=torch.int64, device=device)
        self.token_ids, self.positions = self._no_token.clone(), self._no_token.clone()
        self._tables = [_Table.of(plan, page, num_requests) for page in plan.spares.pages]
        # The group through which a step tells of a table; the batch itself tells of the first.
        self._group_of_table = [
            next(at for at, place in enumerate(plan.of_groups) if place.table == table)
            for table in range(1, len(self._tables))
        ]
        self.slots: Tensor | None = None
        self._group_of_slots = -1
        if plan.spares.slot is not None:
            shape, slot = (num_requests,), plan.spares.slot
            self.slots = torch.full(shape, slot, dtype=torch.int64, device=device)
            has_slots = [place.has_slots for place in plan.of_groups]
            self._group_of_slots = has_slots.index(True)
        self.context_len = torch.ones(num_requests, dtype=torch.int32, device=device)
        self._query_start = torch.arange(num_requests + 1, dtype=torch.int32, device=device)
        self.logits = torch.zeros(num_requests, plan.vocab_size, device=device)

    # ---- before a replay ---------------------------------------------------------------------

    def take_tokens(self, batch: ForwardBatch, size: int) -> None:
        """Take the tokens of the batch, and pad them to `size` with tokens of no request."""
        num, pad = len(batch.token_ids), size - len(batch.token_ids)
        own = [self.token_ids, self.positions, *(table.write_index for table in self._tables)]
        news = [batch.token_ids, batch.positions]
        news += [inputs.write_index for inputs in self._inputs_of_tables(batch)]
        targets, sources = [one[:num] for one in own], news
        if pad:
            targets += [one[num:size] for one in own]
            nothing = [self._no_token, self._no_token, *(table.nowhere for table in self._tables)]
            sources += [one[:pad] for one in nothing]
        torch._foreach_copy_(targets, sources)

    def take_requests(self, batch: ForwardBatch, size: int) -> None:
        """Take the requests of the batch, which have one token each, and pad them to `size`."""
        num = len(batch.attention.query_lens)
        self.context_len[:num].copy_(batch.attention.context_len)
        if num < size:
            self.context_len[num:size].fill_(1)
        for table, inputs in zip(self._tables, self._inputs_of_tables(batch), strict=True):
            table.take_requests(inputs.attention, size)
        slot = self._plan.spares.slot
        if self.slots is not None and slot is not None:
            slots = batch.groups[self._group_of_slots].slots
            assert slots is not None, "the group keeps states"
            self.slots[:num].copy_(slots)
            if num < size:
                self.slots[num:size].fill_(slot)

    def _inputs_of_tables(self, batch: ForwardBatch) -> list[CacheInputs | ForwardBatch]:
        return [batch, *(batch.groups[group] for group in self._group_of_table)]

    # ---- for a capture -----------------------------------------------------------------------

    def decodes(self, kv_caches: Sequence[tuple[Tensor, ...]], size: int) -> ForwardBatch:
        """A step of `size` decodes, whose inputs are in this memory."""
        longest = self._plan.max_pages * self._plan.page_size
        attention = AttentionBatch(
            page_table=self._tables[0].pages[:size],
            query_start=self._query_start[: size + 1],
            context_len=self.context_len[:size],
            query_lens=(1,) * size,
            context_lens=(longest,) * size,
            num_decodes=size,
        )
        slots = None if self.slots is None else self.slots[:size]
        return self._batch(kv_caches, size, attention, [t.pages for t in self._tables], slots)

    def one_request(self, kv_caches: Sequence[tuple[Tensor, ...]], size: int) -> ForwardBatch:
        """A step of `size` tokens of nobody, whose tokens are in this memory; what belongs to its
        requests is not."""
        device, plan = self._plan.device, self._plan
        shape = (1, -(-size // plan.page_size))
        tables = [
            torch.full(shape, page, dtype=torch.int32, device=device) for page in plan.spares.pages
        ]
        attention = AttentionBatch(
            page_table=tables[0],
            query_start=torch.tensor([0, size], dtype=torch.int32, device=device),
            context_len=torch.tensor([size], dtype=torch.int32, device=device),
            query_lens=(size,),
            context_lens=(size,),
            num_decodes=int(size == 1),
        )
        slots = None
        if plan.spares.slot is not None:
            slots = torch.tensor([plan.spares.slot], device=device)
        return self._batch(kv_caches, size, attention, tables, slots)

    def _batch(
        self,
        kv_caches: Sequence[tuple[Tensor, ...]],
        size: int,
        attention: AttentionBatch,
        page_tables: Sequence[Tensor],
        slots: Tensor | None,
    ) -> ForwardBatch:
        num_requests = len(attention.query_lens)
        of_tables = [CacheInputs(write_index=self._write_index(0, size), attention=attention)]
        for at, pages in enumerate(page_tables[1:], start=1):
            # What kernels compute once for a table is of that table.
            other = replace(attention, page_table=pages[:num_requests], cache={})
            of_tables.append(CacheInputs(write_index=self._write_index(at, size), attention=other))
        return ForwardBatch(
            token_ids=self.token_ids[:size],
            positions=self.positions[:size],
            write_index=of_tables[0].write_index,
            attention=attention,
            groups=inputs_of_groups(self._plan.of_groups, of_tables, slots),
            group_of_layer=self._plan.group_of_layer,
            kv_caches=kv_caches,
            logits_index=self.positions[:0],
        )

    def _write_index(self, table: int, size: int) -> Tensor:
        return self._tables[table].write_index[:size]
