"""Attention over paged keys and values as a gather and two batched matrix products.

Keys are gathered token by token: rows of D entries of the cache seen as [num_pages * Hk *
page_size, D]. That costs no more than a gather of whole pages (39 us against 37 for 32 requests of
256 tokens). Only tokens of the request itself are read, so the numbers that an earlier owner left
in the rest of a page, which may be NaN, have no effect.

The products are torch.bmm's, with a group's query heads as rows of one matrix, so that keys are
read once per group. Compared with torch's own attention on 2 cores with AVX-512 BF16: 32 decodes of
256 tokens 178 us against 446; a prompt of 1,024 tokens 5 ms against 10.5. It is the other way round
for a single short request (256 tokens: 42 us against 22), which therefore goes to torch's own.

With a window, only the tokens that the request's new tokens see are gathered. Soft caps, ALiBi and
sinks change the scores in fp32, between the two products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor

from sapwood.kernels.attention_batch import AttentionBatch, AttentionTraits
from sapwood.kernels.torch_ops.linear import cpu_multiplies
from sapwood.kernels.tree_masks import unseen

_FEW_KEYS = 512
"""Up to this many gathered tokens, torch's own attention is the faster."""

_SCORES_AT_ONCE = 1 << 20
"""Scores of one block of a prompt's rows: 2 MiB in bf16, so that both copies stay in the cache."""

_WORTH_A_GROUP = 2048
"""Padding tokens that must be saved before decodes are split into another group of calls."""


@dataclass(frozen=True, slots=True)
class _Decodes:
    """Decodes of similar context length, computed at once.

    rows      [n] which rows of q, or None for the first n of them
    length    tokens that are seen, of the request that sees the most
    index     [n * Hk * length] which rows of the cache; padding points at the first token seen
    bias      [n, 1, 1, length] 0, or -inf at padding; None if there is none
    distance  [n, 1, 1, length] fp32: position of the key minus that of the query
    """

    num_requests: int
    length: int
    rows: Tensor | None
    index: Tensor
    bias: Tensor | None
    distance: Tensor


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The new tokens of one request that has several: rows start .. end of q.

    num_cached  keys before the new tokens that are seen
    length      keys that are seen, the new tokens' included
    index       [Hk * length] which rows of the cache
    bias        [n, n] 0, or -inf where a new token does not see a new token before it; None: each
                sees all of them
    """

    start: int
    end: int
    num_cached: int
    length: int
    index: Tensor
    bias: Tensor | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """The part of the computation that is the same in every layer of a step.

    keys, values     scratch for gathered keys and values: one allocation per step instead of one
                     per layer, because fresh memory costs a page fault per 4 KiB
    scores, weights  scratch for the two sides of the softmax
    triangle         [n, n] 0, or -inf above the diagonal; n is the longest block of rows
    """

    decodes: tuple[_Decodes, ...]
    prompts: tuple[_Prompt, ...]
    keys: Tensor
    values: Tensor
    scores: Tensor
    weights: Tensor
    triangle: Tensor


@dataclass(frozen=True, slots=True)
class _Shape:
    num_heads: int
    num_kv_heads: int
    page_size: int
    head_dim: int

    @property
    def group(self) -> int:
        return self.num_heads // self.num_kv_heads

    def rows_at_once(self, prompt: int, length: int) -> int:
        """Number of a prompt's rows in one block."""
        return min(prompt, max(16, _SCORES_AT_ONCE // (self.num_heads * length)))


class PagedAttention:
    """See `Kernels.paged_attention`. Holds nothing but a fact about this CPU."""

    def __init__(self) -> None:
        self._widen_fp16 = not cpu_multiplies(torch.float16)

    def __call__(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits,
    ) -> Tensor:
        _, num_kv_heads, page_size, head_dim = key_cache.shape
        shape = _Shape(q.shape[1], num_kv_heads, page_size, head_dim)
        # Groups of layers may share pages that are of different size in each.
        sizes = f"{shape.num_heads} {num_kv_heads} {head_dim} {key_cache.stride(0)}"
        key = f"torch {sizes} {q.dtype} {traits.window}"
        plan = cast("_Plan | None", batch.cache.get(key))
        if plan is None:
            plan = batch.cache[key] = self._plan(shape, q, key_cache, batch, traits.window)
        compute_dtype = plan.scores.dtype
        wide_q = q.to(compute_dtype)
        key_rows, value_rows = _rows_of(key_cache), _rows_of(value_cache)
        out: Tensor | None = None
        for decodes in plan.decodes:
            keys, values = _gather(plan, key_rows, value_rows, decodes.index, compute_dtype)
            result = _attend_decodes(shape, plan, decodes, wide_q, keys, values, scale, traits)
            if decodes.num_requests == q.shape[0]:
                return result.to(q.dtype)
            out = torch.empty_like(q) if out is None else out
            if decodes.rows is None:
                out[: decodes.num_requests] = result
            else:
                out.index_copy_(0, decodes.rows, result.to(q.dtype))
        out = torch.empty_like(q) if out is None else out
        for prompt in plan.prompts:
            keys, values = _gather(plan, key_rows, value_rows, prompt.index, compute_dtype)
            _attend_prompt(shape, plan, prompt, wide_q, keys, values, scale, traits, out)
        return out

    def _plan(
        self,
        shape: _Shape,
        q: Tensor,
        key_cache: Tensor,
        batch: AttentionBatch,
        window: int | None,
    ) -> _Plan:
        dtype = q.dtype
        if dtype == torch.float16 and q.device.type == "cpu" and self._widen_fp16:
            dtype = torch.float32
        firsts = first_keys(batch, window)
        decodes = tuple(_plan_decodes(shape, key_cache, batch, firsts, dtype))
        prompts = tuple(_plan_prompts(shape, key_cache, batch, firsts, dtype))
        blocks = [(shape.rows_at_once(p.end - p.start, p.length), p.length) for p in prompts]
        indices = [d.index for d in decodes] + [p.index for p in prompts]
        num_gathered = max(index.shape[0] for index in indices)
        num_scores = max(
            *(shape.num_heads * d.num_requests * d.length for d in decodes),
            *(shape.num_heads * rows * length for rows, length in blocks),
            0,
            0,
        )
        widest = max((rows for rows, _ in blocks), default=0)
        triangle = torch.full((widest, widest), -torch.inf, dtype=dtype, device=q.device)
        return _Plan(
            decodes=decodes,
            prompts=prompts,
            keys=key_cache.new_empty(num_gathered, shape.head_dim),
            values=key_cache.new_empty(num_gathered, shape.head_dim),
            scores=q.new_empty(num_scores, dtype=dtype),
            weights=q.new_empty(num_scores, dtype=dtype),
            triangle=triangle.triu_(1),
        )


def first_keys(batch: AttentionBatch, window: int | None) -> list[int]:
    """The position of the first key of each request that its first new token sees."""
    if window is None:
        return [0] * len(batch.query_lens)
    return [
        max(0, length - num_new - window + 1)
        for length, num_new in zip(batch.context_lens, batch.query_lens, strict=True)
    ]


def group_by_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split requests into groups, so that padding each to its group's longest wastes little.

    A request opens a new group when it is less than half as long as the group's longest and the
    shorter ones together would be padded by more than `_WORTH_A_GROUP` tokens. At least one group;
    it keeps the requests' order if it is the only one.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    groups: list[list[int]] = []
    for position, index in enumerate(order):
        if groups:
            longest = lengths[groups[-1][0]]
            saved = (longest - lengths[index]) * (len(order) - position)
            if lengths[index] * 2 >= longest or saved <= _WORTH_A_GROUP:
                groups[-1].append(index)
                continue
        groups.append([index])
    return groups if len(groups) > 1 else [list(range(len(lengths)))]


def _plan_decodes(
    shape: _Shape,
    key_cache: Tensor,
    batch: AttentionBatch,
    firsts: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[_Decodes]:
    if batch.num_decodes == 0:
        return
    device = batch.page_table.device
    seen = [batch.context_lens[i] - firsts[i] for i in range(batch.num_decodes)]
    groups = group_by_length(seen)
    for group in groups:
        lengths = [seen[i] for i in group]
        longest = max(lengths)
        rows = torch.tensor(group, device=device) if len(groups) > 1 else None
        pages, context_len = (
            table[: len(group)] if rows is None else table.index_select(0, rows)
            for table in (batch.page_table, batch.context_len)
        )
        end = context_len.unsqueeze(1)
        token = torch.arange(longest, device=device).expand(len(group), longest)
        if any(firsts):
            token = token + torch.tensor([firsts[i] for i in group], device=device).unsqueeze(1)
        distance = (token - (end - 1)).float().view(len(group), 1, 1, longest)
        bias = None
        if min(lengths) < longest:
            padding = token >= end
            token = torch.where(padding, token[:, :1], token)
            bias = torch.zeros(padding.shape, dtype=dtype, device=device)
            bias = bias.masked_fill_(padding, -torch.inf).view(len(group), 1, 1, longest)
        index = _cache_rows(shape, key_cache, pages, token)
        yield _Decodes(len(group), longest, rows, index, bias, distance)


def _plan_prompts(
    shape: _Shape,
    key_cache: Tensor,
    batch: AttentionBatch,
    firsts: Sequence[int],
    dtype: torch.dtype,
) -> Iterator[_Prompt]:
    start = batch.num_decodes
    for row in range(batch.num_decodes, len(batch.query_lens)):
        num_new, first = batch.query_lens[row], firsts[row]
        length = batch.context_lens[row] - first
        token = torch.arange(first, first + length, device=batch.page_table.device).unsqueeze(0)
        index = _cache_rows(shape, key_cache, batch.page_table[row : row + 1], token)
        bias = None
        if batch.sees is not None:
            hidden = unseen(batch.sees[start : start + num_new])
            bias = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device)
            bias = bias.masked_fill_(hidden, -torch.inf)
        yield _Prompt(start, start + num_new, length - num_new, length, index, bias)
        start += num_new


def _cache_rows(shape: _Shape, key_cache: Tensor, pages: Tensor, token: Tensor) -> Tensor:
    """pages [n, max_pages], token [n, length] -> rows of the cache [n * Hk * length].

    They are int32 while the cache has few enough rows: less to read per token.
    """
    rows_per_page = key_cache.stride(0) // shape.head_dim
    dtype = torch.int32 if key_cache.shape[0] * rows_per_page < 2**31 else torch.int64
    page = pages.gather(1, token // shape.page_size).to(dtype)
    first = page * rows_per_page + (token % shape.page_size).to(dtype)
    head = torch.arange(shape.num_kv_heads, dtype=dtype, device=pages.device) * shape.page_size
    return (first.unsqueeze(1) + head.view(1, -1, 1)).flatten()


def _rows_of(cache: Tensor) -> Tensor:
    """[pages, Hk, page_size, D] -> all rows from the first page's to the last one's, [n, D].

    A page of all layers is one piece of memory, so the parts of other layers lie in between.
    """
    num_pages, num_heads, page_size, head_dim = cache.shape
    rows = (num_pages - 1) * cache.stride(0) // head_dim + num_heads * page_size
    return cache.as_strided((rows, head_dim), (head_dim, 1))


def _gather(
    plan: _Plan, key_rows: Tensor, value_rows: Tensor, index: Tensor, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The keys and values at `index`, [len(index), D] each."""
    num = index.shape[0]
    keys = torch.index_select(key_rows, 0, index, out=plan.keys[:num])
    values = torch.index_select(value_rows, 0, index, out=plan.values[:num])
    return keys.to(dtype), values.to(dtype)


def _attend_decodes(
    shape: _Shape,
    plan: _Plan,
    decodes: _Decodes,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    traits: AttentionTraits,
) -> Tensor:
    """[n, Hq, D]"""
    num, length = decodes.num_requests, decodes.length
    by_group = (num, shape.num_kv_heads, shape.group, shape.head_dim)
    by_request = (num, shape.num_kv_heads, length, shape.head_dim)
    rows = q[:num] if decodes.rows is None else q.index_select(0, decodes.rows)
    adjusts = _adjusts(traits)
    if num * length <= _FEW_KEYS and not adjusts:
        mask = decodes.bias
        if mask is not None:
            mask = mask.expand(num, shape.num_kv_heads, shape.group, length)
        out = F.scaled_dot_product_attention(
            rows.view(by_group), keys.view(by_request), values.view(by_request), mask, scale=scale
        )
        return out.reshape(rows.shape)
    batch = num * shape.num_kv_heads
    scores = plan.scores[: batch * shape.group * length].view(batch, shape.group, length)
    by_head = rows.reshape(batch, shape.group, shape.head_dim)
    keys_t = keys.view(batch, length, shape.head_dim).transpose(1, 2)
    torch.baddbmm(scores, by_head, keys_t, beta=0, alpha=scale, out=scores)
    by_request_scores = scores.view(num, shape.num_kv_heads, shape.group, length)
    if adjusts:
        per_head = (shape.num_kv_heads, shape.group, 1)
        weights = _weights(by_request_scores, decodes.distance, decodes.bias, traits, per_head)
        weights = weights.to(scores.dtype).view(scores.shape)
    else:
        if decodes.bias is not None:
            by_request_scores.add_(decodes.bias)
        weights = torch.softmax(scores, -1, out=plan.weights[: scores.numel()].view(scores.shape))
    return torch.bmm(weights, values.view(batch, length, shape.head_dim)).view(rows.shape)


def _attend_prompt(
    shape: _Shape,
    plan: _Plan,
    prompt: _Prompt,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    scale: float,
    traits: AttentionTraits,
    out: Tensor,
) -> None:
    """Fill rows start .. end of `out`, block by block; keys that no row of a block sees are left
    out."""
    heads, group, head_dim = shape.num_kv_heads, shape.group, shape.head_dim
    keys_t = keys.view(heads, prompt.length, head_dim).transpose(1, 2)
    values = values.view(heads, prompt.length, head_dim)
    at_once = shape.rows_at_once(prompt.end - prompt.start, prompt.length)
    is_plain = traits.window is None and not _adjusts(traits)
    for start in range(prompt.start, prompt.end, at_once):
        end = min(start + at_once, prompt.end)
        rows, position = end - start, prompt.num_cached + start - prompt.start
        first = 0 if traits.window is None else max(0, position - traits.window + 1)
        seen = slice(first, position + rows)
        num_seen = position + rows - first
        block = q[start:end].view(rows, heads, group, head_dim).permute(1, 2, 0, 3)
        size = heads * group * rows * num_seen
        scores = plan.scores[:size].view(heads, group * rows, num_seen)
        block = block.reshape(heads, group * rows, head_dim)
        torch.baddbmm(scores, block, keys_t[..., seen], beta=0, alpha=scale, out=scores)
        by_head = scores.view(heads, group, rows, num_seen)
        if is_plain:
            by_head[..., -rows:].add_(plan.triangle[:rows, :rows])
            _hide_unseen(by_head, prompt, start, end)
            weights = torch.softmax(scores, -1, out=plan.weights[:size].view(scores.shape))
        else:
            distance = _distance(position - first, rows, num_seen, q.device)
            mask = _mask(distance, traits.window)
            _hide_unseen(mask, prompt, start, end)
            weights = _weights(by_head, distance, mask, traits, (heads, group, 1, 1))
            weights = weights.to(scores.dtype).view(scores.shape)
        result = torch.bmm(weights, values[:, seen]).view(heads, group, rows, head_dim)
        target = out[start:end].view(rows, heads, group, head_dim)
        target.copy_(result.permute(2, 0, 1, 3))


def _hide_unseen(scores: Tensor, prompt: _Prompt, start: int, end: int) -> None:
    """Add -inf to scores [..., end - start, keys] where a row does not see a new token before it;
    the last key is that of row end - 1."""
    if prompt.bias is not None:
        first, last = start - prompt.start, end - prompt.start
        scores[..., -last:].add_(prompt.bias[first:last, :last])


def _adjusts(traits: AttentionTraits) -> bool:
    """Whether scores become weights by more than a mask and a softmax."""
    return not (traits.soft_cap is None and traits.sinks is None and traits.alibi is None)


def _weights(
    scores: Tensor,
    distance: Tensor,
    mask: Tensor | None,
    traits: AttentionTraits,
    per_head: tuple[int, ...],
) -> Tensor:
    """Scaled scores [..., keys] -> weights of the same shape, fp32.

    distance, mask  of shapes that broadcast to that of the scores; a mask is 0 or -inf
    per_head        the shape of a number per query head that does so
    """
    wide = scores.float()
    if traits.soft_cap is not None:
        wide = torch.tanh(wide / traits.soft_cap) * traits.soft_cap
    if traits.alibi is not None:
        wide = wide + traits.alibi.view(per_head) * distance
    if mask is not None:
        wide = wide + mask
    if traits.sinks is None:
        return wide.softmax(dim=-1)
    sinks = traits.sinks.view(per_head).expand(*wide.shape[:-1], 1)
    return torch.cat((wide, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def _distance(first_query: int, num_queries: int, num_keys: int, device: torch.device) -> Tensor:
    """[num_queries, num_keys] fp32: position of the key, the first being 0, minus the query's."""
    key = torch.arange(num_keys, dtype=torch.float32, device=device)
    return key - key[first_query : first_query + num_queries].unsqueeze(1)


def _mask(distance: Tensor, window: int | None) -> Tensor:
    """0 where a query sees a key, else -inf."""
    hidden = distance > 0
    if window is not None:
        hidden |= distance <= -window
    return torch.zeros_like(distance).masked_fill_(hidden, -torch.inf)
