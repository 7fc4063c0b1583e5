"""Compares every op of a kernel implementation with the reference, on the implementation's device.

A check is a function from a Case and two implementations to pairs of tensors (got, wanted). Tests
and `sapwood bench gpu` run the same checks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.kernels.coded import CodedWeight, quantize_codes
from sapwood.kernels.interface import Kernels
from sapwood.kernels.kv_cache import LARGEST_NUMBER, dequantize_pages, kv_cache_shape
from sapwood.kernels.packed import PackedExperts
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings

LIMITS = {torch.float32: 2e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}
"""Largest difference that rounding may cause, relative to the largest wanted value."""
QUANTIZED_LIMIT = 3e-2
"""The limit for products whose activations are rounded to int8, perhaps a little differently."""

SAMPLE_LIMIT = 0.1
"""The limit for how often each token is drawn, relative to the likeliest one's number."""

Pair = tuple[Tensor, Tensor]
CheckFunction = Callable[["Case", Kernels, Kernels], Iterable[Pair]]


@dataclass(frozen=True, kw_only=True)
class Case:
    """Sizes, dtype and device of random operands; the same seed gives the same operands."""

    device: torch.device
    dtype: torch.dtype
    num_heads: int
    num_kv_heads: int
    head_dim: int
    page_size: int
    hidden_size: int = 256
    vocab_size: int = 1000
    seed: int = 0
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "generator", torch.Generator().manual_seed(self.seed))

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{dtype}, heads {self.num_heads}/{self.num_kv_heads} x {self.head_dim}"

    def randn(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Drawn on the host, so that every device gets the same numbers."""
        drawn = torch.randn(shape, generator=self.generator)
        return drawn.to(self.dtype if dtype is None else dtype).to(self.device)

    def randint(self, high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """The result of one check.

    error    largest difference relative to the largest wanted value
    failure  the error that was raised; None: none was
    """

    name: str
    case: str
    error: float
    limit: float
    seconds: float
    failure: str = ""

    @property
    def passed(self) -> bool:
        return not self.failure and self.error <= self.limit


CHECKS: dict[str, tuple[CheckFunction, float | None]] = {}
"""Name -> (check, its limit); None: the limit of the dtype."""


def check(name: str, *, limit: float | None = None) -> Callable[[CheckFunction], CheckFunction]:
    def register(function: CheckFunction) -> CheckFunction:
        CHECKS[name] = (function, limit)
        return function

    return register


@torch.inference_mode()
def run_checks(
    kernels: Kernels, reference: Kernels, cases: Sequence[Case], names: Iterable[str] = ()
) -> Iterator[CheckResult]:
    """Run every check, or those in `names`, on every case. An exception is a failed check."""
    for name in names or CHECKS:
        function, limit = CHECKS[name]
        for case in cases:
            start_s, error, failure = time.perf_counter(), 0.0, ""
            try:
                pairs = list(function(case, kernels, reference))
                error = max(_difference(got, wanted) for got, wanted in pairs)
            except Exception as raised:  # noqa: BLE001 - one kernel's failure must not hide others
                failure = f"{type(raised).__name__}: {raised}"
            yield CheckResult(
                name=name,
                case=str(case),
                error=error,
                limit=LIMITS[case.dtype] if limit is None else max(limit, LIMITS[case.dtype]),
                seconds=time.perf_counter() - start_s,
                failure=failure,
            )


def _difference(got: Tensor, wanted: Tensor) -> float:
    """The largest difference; infinite if only one of both values is NaN."""
    if got.shape != wanted.shape:
        raise ValueError(f"shape is {tuple(got.shape)} but must be {tuple(wanted.shape)}")
    got, wanted = got.double().cpu(), wanted.double().cpu()
    same = (got == wanted) | (got.isnan() & wanted.isnan())
    if bool(same.all()):
        return 0.0
    scale = wanted[wanted.isfinite()].abs().max().clamp(min=1e-6)
    largest = float(((got - wanted).abs()[~same]).max() / scale)
    return largest if largest == largest else float("inf")


@check("embedding")
def _embedding(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    ids, weight = case.randint(case.vocab_size, 33), case.randn(case.vocab_size, case.hidden_size)
    yield kernels.embedding(ids, weight), reference.embedding(ids, weight)


@check("rms_norm")
def _rms_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(case.hidden_size)
    for rows in (1, 7, 130):
        x = case.randn(rows, case.hidden_size)
        yield kernels.rms_norm(x, weight, 1e-5), reference.rms_norm(x, weight, 1e-5)


@check("add_rms_norm")
def _add_rms_norm(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(case.hidden_size)
    for rows in (1, 65):
        x, residual = (case.randn(rows, case.hidden_size) for _ in "ab")
        got = kernels.add_rms_norm(x.clone(), residual.clone(), weight, 1e-5)
        yield from zip(got, reference.add_rms_norm(x, residual, weight, 1e-5), strict=True)


@check("activate_and_mul")
def _activate_and_mul(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for activation in Activation:
        for rows in (1, 33):
            x = case.randn(rows, 2 * case.hidden_size)
            got = kernels.activate_and_mul(x.clone(), activation)
            yield got, reference.activate_and_mul(x, activation)


@check("qk_norm_rope_write_kv")
def _write_kv(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    num_tokens, num_pages = 19, 9
    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    shape = kv_cache_shape(num_pages, case.num_kv_heads, case.page_size, case.head_dim)
    places = torch.randperm(num_pages * case.page_size, generator=case.generator)[:num_tokens]
    for has_norms in (False, True):
        qkv, positions = case.randn(num_tokens, width), case.randint(300, num_tokens)
        cos_sin = case.randn(300, case.head_dim, dtype=torch.float32)
        norms = [case.randn(case.head_dim) if has_norms else None for _ in "qk"]
        found = []
        for ops in (kernels, reference):
            keys, values = (torch.zeros(shape, dtype=case.dtype, device=case.device) for _ in "kv")
            q = ops.qk_norm_rope_write_kv(
                qkv.clone(),
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                q_norm=norms[0],
                k_norm=norms[1],
                eps=1e-6,
                cos_sin=cos_sin,
                positions=positions,
                key_cache=keys,
                value_cache=values,
                write_index=places[: len(qkv)].to(case.device),
            )
            found.append((q, keys, values))
        yield from zip(*found, strict=True)


@check("attention of decodes")
def _decodes(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for requests in ([(1, 1)], [(1, 700)], [(1, 16), (1, 333), (1, 5), (1, 64)]):
        yield _attend(case, requests, kernels, reference)


@check("attention of prompts")
def _prompts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    for requests in ([(40, 40)], [(9, 260)], [(130, 130), (17, 90)]):
        yield _attend(case, requests, kernels, reference)


@check("attention of a mixed step")
def _mixed(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    yield _attend(case, [(1, 20), (1, 800), (30, 30), (5, 210)], kernels, reference)


def _attend(
    case: Case, requests: Sequence[tuple[int, int]], kernels: Kernels, reference: Kernels
) -> Pair:
    """Attention for requests, (new tokens, context length) each; unwritten KV is NaN."""
    counts = [-(-length // case.page_size) for _, length in requests]
    pages = torch.split(torch.randperm(sum(counts), generator=case.generator) + 1, counts)
    shape = kv_cache_shape(1 + sum(counts), case.num_kv_heads, case.page_size, case.head_dim)
    caches = [torch.full(shape, torch.nan, dtype=case.dtype, device=case.device) for _ in "kv"]
    table = torch.zeros(len(requests), max(counts), dtype=torch.int32)
    for row, ((_, length), own) in enumerate(zip(requests, pages, strict=True)):
        table[row, : len(own)] = own
        for cache in caches:
            tokens = case.randn(case.num_kv_heads, length, case.head_dim)
            for number, page in enumerate(own.tolist()):
                written = tokens[:, number * case.page_size : (number + 1) * case.page_size]
                cache[page, :, : written.shape[1]] = written
    query_lens = tuple(num_new for num_new, _ in requests)
    context_lens = tuple(length for _, length in requests)
    starts = torch.tensor((0, *query_lens)).cumsum(0).to(torch.int32)
    q = case.randn(sum(query_lens), case.num_heads, case.head_dim)

    def batch() -> AttentionBatch:
        return AttentionBatch(
            page_table=table.to(case.device),
            query_start=starts.to(case.device),
            context_len=torch.tensor(context_lens, dtype=torch.int32).to(case.device),
            query_lens=query_lens,
            context_lens=context_lens,
            num_decodes=query_lens.count(1),
        )

    scale = case.head_dim**-0.5
    got, wanted = (
        ops.paged_attention(q, caches[0], caches[1], batch(), scale) for ops in (kernels, reference)
    )
    return got, wanted


@check("8-bit KV cache")
def _kv_in_8_bits(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """The written values, which are not rotated, and attention to one and the same cache."""
    lengths = (5, 3 * case.page_size, 70)
    num_pages = [-(-length // case.page_size) for length in lengths]
    width = (case.num_heads + 2 * case.num_kv_heads) * case.head_dim
    table = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32)
    first, places = 1, []
    for row, length, num in zip(table, lengths, num_pages, strict=True):
        row[:num] = torch.arange(first, first + num)
        places.append(torch.arange(length) + first * case.page_size)
        first += num
    batch = AttentionBatch(
        page_table=table.to(case.device),
        query_start=torch.arange(4, dtype=torch.int32).to(case.device),
        context_len=torch.tensor(lengths, dtype=torch.int32).to(case.device),
        query_lens=(1, 1, 1),
        context_lens=lengths,
        num_decodes=3,
    )
    for dtype in LARGEST_NUMBER:
        shape = kv_cache_shape(first, case.num_kv_heads, case.page_size, case.head_dim, dtype)
        qkv, found = case.randn(sum(lengths), width), []
        for ops in (kernels, reference):
            caches = [torch.zeros(shape, dtype=torch.uint8, device=case.device) for _ in "kv"]
            keys, values = (cache.view(dtype) for cache in caches)
            ops.qk_norm_rope_write_kv(
                qkv.clone(),
                num_heads=case.num_heads,
                num_kv_heads=case.num_kv_heads,
                head_dim=case.head_dim,
                q_norm=None,
                k_norm=None,
                eps=1e-6,
                cos_sin=torch.ones(1, case.head_dim, device=case.device),
                positions=torch.zeros(sum(lengths), dtype=torch.int64, device=case.device),
                key_cache=keys,
                value_cache=values,
                write_index=torch.cat(places).to(case.device),
            )
            found.append((keys, values))
        pages = torch.arange(first, device=case.device)
        got, wanted = (
            dequantize_pages(values, pages, case.head_dim, torch.float32) for _, values in found
        )
        yield got, wanted
        q = case.randn(3, case.num_heads, case.head_dim)
        got, wanted = (
            ops.paged_attention(q, *found[1], replace(batch, cache={}), case.head_dim**-0.5)
            for ops in (kernels, reference)
        )
        yield got, wanted


@check("linear")
def _linear(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    weight = case.randn(3 * case.hidden_size, case.hidden_size)
    for bias in (None, case.randn(3 * case.hidden_size)):
        mine, its = (ops.pack_linear(weight, bias) for ops in (kernels, reference))
        for rows in (1, 70):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)
            yield mine.fp32(x), its.fp32(x)


def _check_quantized(kind: str) -> None:
    @check(f"linear of {kind} weights", limit=QUANTIZED_LIMIT)
    def _quantized(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
        if case.dtype == torch.float16:
            return  # activations of quantised weights are bf16 or fp32
        drawn = torch.randn(2 * case.hidden_size, case.hidden_size, generator=case.generator)
        part = kernels.quantize_weight(drawn.to(case.device), kind)
        mine, its = (
            ops.pack_quantized_linear([part], None, case.dtype) for ops in (kernels, reference)
        )
        for rows in (1, 33):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)


for _kind in ("int8", "q8_0", "q4_1"):
    _check_quantized(_kind)


@check("linear of codes", limit=QUANTIZED_LIMIT)
def _codes(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """A scale per output (FP8, int8), per block, and per 16 and 64 inputs."""
    if case.dtype == torch.float16:
        return
    shape = (2 * case.hidden_size, case.hidden_size)
    drawn = torch.randn(shape, generator=case.generator)
    parts = [quantize_codes(drawn, codes) for codes in ("e4m3", "int8")]
    for codes, wanted in (("e4m3", 128), ("fp4", 16), ("nf4", 64), ("int4", 64)):
        group = min(wanted, case.hidden_size)
        width = shape[1] if codes == "e4m3" else shape[1] // 2
        # Codes of E4M3 below 120 are numbers, and none is much larger than the others.
        data = torch.randint(0, 120, (shape[0], width), generator=case.generator).to(torch.uint8)
        scales = torch.rand((shape[0], shape[1] // group), generator=case.generator)
        parts.append(CodedWeight(codes, shape, data, scales, group))
    for part in parts:
        there = [part.to(case.device)]
        mine, its = (
            ops.pack_quantized_linear(there, None, case.dtype) for ops in (kernels, reference)
        )
        for rows in (1, 33):
            x = case.randn(rows, case.hidden_size)
            yield mine(x), its(x)


@check("experts")
def _experts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    drawn = [
        [case.randn(*shape) * shape[1] ** -0.5 for _ in range(NUM_EXPERTS)]
        for shape in _expert_shapes(case)
    ]

    def packed(ops: Kernels) -> PackedExperts:
        gate_up, down = ([ops.pack_linear(one, None) for one in side] for side in drawn)
        return ops.pack_experts(gate_up, down, Activation.SILU)

    yield from _choose_experts(case, kernels, reference, packed)


@check("experts of codes", limit=QUANTIZED_LIMIT)
def _coded_experts(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """Of 8 bits, whose activations are not rounded."""
    if case.dtype == torch.float16:
        return
    for codes in ("int8", "e4m3"):
        parts = [
            [
                quantize_codes(torch.randn(shape, generator=case.generator), codes).to(case.device)
                for _ in range(NUM_EXPERTS)
            ]
            for shape in _expert_shapes(case)
        ]

        def packed(ops: Kernels, parts: list[list[CodedWeight]] = parts) -> PackedExperts:
            gate_up, down = (
                [ops.pack_quantized_linear([part], None, case.dtype) for part in side]
                for side in parts
            )
            return ops.pack_experts(gate_up, down, Activation.SILU)

        yield from _choose_experts(case, kernels, reference, packed)


NUM_EXPERTS = 8


def _expert_shapes(case: Case) -> list[tuple[int, int]]:
    return [(2 * case.hidden_size, case.hidden_size), (case.hidden_size, case.hidden_size)]


def _choose_experts(
    case: Case, kernels: Kernels, reference: Kernels, packed: Callable[[Kernels], PackedExperts]
) -> Iterator[Pair]:
    """A token, and more of them than there are experts, routed alike for both."""
    mine, its = packed(kernels), packed(reference)
    rule = Routing(num_chosen=2, renormalise=True)
    for rows in (1, 50):
        logits = case.randn(rows, NUM_EXPERTS, dtype=torch.float32)
        weights, chosen = reference.route(logits, None, rule)
        routed = kernels.route(logits, None, rule)
        yield routed[0], weights
        yield routed[1], chosen
        x = case.randn(rows, case.hidden_size)
        yield mine(x, chosen, weights), its(x, chosen, weights)


@check("argmax")
def _argmax(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    logits = case.randn(9, case.vocab_size, dtype=torch.float32)
    logits[3, 5:9] = logits[3].max() + 1  # the first of equal ones
    yield kernels.argmax(logits.clone()), reference.argmax(logits)


@check("mask_logits")
def _mask_logits(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    words = -(-case.vocab_size // 32)
    masks = torch.randint(-(2**31), 2**31, (3, words), generator=case.generator).to(torch.int32)
    logits = case.randn(5, case.vocab_size, dtype=torch.float32)
    mine, its = logits.clone(), logits.clone()
    kernels.mask_logits(mine, masks, [4, 0, 2])
    reference.mask_logits(its, masks, [4, 0, 2])
    yield mine, its


@check("penalise")
def _penalise(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    num_seen = min(200, case.vocab_size)
    ids = torch.randperm(case.vocab_size, generator=case.generator)[:num_seen].to(case.device)
    counts = torch.randint(0, 4, (num_seen,), generator=case.generator).float().to(case.device)
    logits = case.randn(case.vocab_size, dtype=torch.float32)
    mine, its = logits.clone(), logits.clone()
    for ops, row in ((kernels, mine), (reference, its)):
        ops.penalise(row, ids, counts, repetition=1.3, frequency=0.2, presence=0.4)
    yield mine, its


@check("sample", limit=SAMPLE_LIMIT)
def _sample(case: Case, kernels: Kernels, reference: Kernels) -> Iterator[Pair]:
    """How often each token is drawn with evenly spread random numbers.

    Only frequencies can be compared: each implementation has its own order of tokens.
    """
    count = 256
    logits = (case.randn(1, case.vocab_size, dtype=torch.float32) * 3).repeat(count, 1)
    numbers = [(index + 0.5) / count for index in range(count)]
    for top_k, top_p, min_p in ((1, 1.0, 0.0), (4, 1.0, 0.0), (-1, 0.5, 0.0), (-1, 1.0, 0.3)):
        settings = SamplingSettings(
            temperature=[0.9] * count,
            top_k=[top_k] * count,
            top_p=[top_p] * count,
            min_p=[min_p] * count,
            numbers=numbers,
        )
        got, wanted = (ops.sample(logits.clone(), settings) for ops in (kernels, reference))
        drawn, expected = (
            torch.bincount(tokens.cpu(), minlength=case.vocab_size) for tokens in (got, wanted)
        )
        yield drawn, expected
