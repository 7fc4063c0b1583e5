"""CpuKernels: checks shapes, dtypes and layouts, then hands addresses to the compiled module.

One row of a small model costs about 5 us of arithmetic per op, so every op makes one call into C++
and allocates only its result. Tensors that are not contiguous are copied, except those that an op
writes to: these are refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from sapwood.kernels.activations import Activation
from sapwood.kernels.attention_batch import (
    ALIBI,
    CHOSEN_KEYS,
    LATENT,
    PLAIN,
    SINKS,
    SLIDING_WINDOW,
    SOFT_CAP,
    AttentionBatch,
    AttentionTraits,
    lacking,
)
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.cpu.shared import groups_of_decodes
from sapwood.kernels.cpu.tensors import (
    ACTIVATIONS,
    DTYPES,
    address_of,
    cache_layout,
    check_embedding,
    check_indices,
    describe,
    dtype_of,
    is_held,
    per_head,
    rows_of,
    table_of,
)
from sapwood.kernels.low_rank import AdapterRoom, LowRankLayer
from sapwood.kernels.packed import PackedExperts, PackedHeads, PackedLinear
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.recording import Program, RecordedStep
from sapwood.kernels.registry import Need
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.texts import EqualTexts
from sapwood.kernels.torch_ops import latent as torch_latent
from sapwood.kernels.torch_ops.experts import activation_of
from sapwood.kernels.torch_ops.ops import TorchKernels
from sapwood.kernels.torch_ops.penalties import penalise
from sapwood.kernels.torch_ops.rows import copy_rows, soft_cap

try:
    from sapwood.kernels.cpu import _native
    from sapwood.kernels.cpu.both_ways import attend_both_ways
    from sapwood.kernels.cpu.experts import pack_experts, route
    from sapwood.kernels.cpu.head_products import HeadProducts
    from sapwood.kernels.cpu.latent import (
        choose_keys,
        latent_attention,
        norm_rope_write_latent,
        sparse_latent_attention,
    )
    from sapwood.kernels.cpu.linear import Linear
    from sapwood.kernels.cpu.low_rank import NativeLowRank
    from sapwood.kernels.cpu.quantized import WEIGHT_KINDS, QuantizedLinear, quantize_weight
    from sapwood.kernels.cpu.rotations import norm_rotate_heads
    from sapwood.kernels.cpu.rows import carry_rows
    from sapwood.kernels.cpu.states import (
        causal_conv,
        gate_columns,
        gated_delta_rule,
        gated_rms_norm,
        selective_scan,
    )
    from sapwood.kernels.cpu.step import NativeStep
    from sapwood.kernels.large_pages import WeightMemory
except ImportError as error:
    _missing: str | None = f"the extension is not built ({error}); reinstall with a C++20 compiler"
else:
    _missing = None

_TORCH = TorchKernels()
_ATTENTION = frozenset({SLIDING_WINDOW, SOFT_CAP, SINKS, ALIBI, LATENT, CHOSEN_KEYS})


class CpuKernels:
    """The ops for float32 and bfloat16 on CPUs.

    num_threads  threads of each op, the caller included; the default is torch's number. They are
                 not torch's threads: they spin for 200 us after an op, then sleep
    isa          "generic"; on x86 "avx2", "avx2_vnni", "avx512", "avx512_vnni", "avx512_bf16",
                 "amx" or, for tests, "amx_emulated"; on ARM "neon", "neon_dotprod" or "neon_bf16";
                 the default is the fastest usable one
    exact_products  a row of a product depends on that row and the weights alone; else many rows
                 may be multiplied by a faster kernel that rounds otherwise
    Raises       ValueError if this machine cannot run `isa`
    """

    name = "cpu"
    multiplies_quantized = True
    can_be_captured = False
    captures_experts = False

    def __init__(
        self,
        *,
        num_threads: int | None = None,
        isa: str | None = None,
        exact_products: bool = False,
    ) -> None:
        if _missing is not None:
            raise RuntimeError(_missing)
        threads = torch.get_num_threads() if num_threads is None else num_threads
        self._context = _native.Context("" if isa is None else isa, threads)
        self._context.exact_products = exact_products
        self._memory = WeightMemory()
        self._mixture = _native.Mixture()

    @staticmethod
    def why_not(need: Need) -> str | None:
        if _missing is not None:
            return _missing
        if need.device != "cpu":
            return f"runs on cpu, not on {need.device}"
        if need.dtype not in DTYPES:
            return f"{need.dtype} is neither float32 nor bfloat16"
        if need.why_not_kv() is not None:
            return need.why_not_kv()
        step, limit = _native.HEAD_DIM_STEP, _native.MAX_HEAD_DIM
        if need.head_dim % step != 0 or need.head_dim > limit:
            return f"head size {need.head_dim} is not a multiple of {step} up to {limit}"
        return lacking(need.attention, _ATTENTION)

    @staticmethod
    def usable_isas() -> list[str]:
        """The instruction sets that this build has and this machine can run, slowest first."""
        return [] if _missing is not None else _native.usable_isas()

    @staticmethod
    def compiled_isas() -> list[str]:
        """The instruction sets that this build has, slowest first."""
        return [] if _missing is not None else _native.COMPILED_ISAS.split()

    @property
    def isa(self) -> str:
        return self._context.isa

    @property
    def num_threads(self) -> int:
        return self._context.threads

    @property
    def context(self) -> _native.Context:
        """What the compiled module keeps for these kernels."""
        return self._context

    def set_num_threads(self, num_threads: int) -> None:
        """Torch is left with one thread: what it still computes is small, and its idle threads
        would spin on the cores of ours. Raises ValueError unless num_threads is in [1, 1024]."""
        self._context.threads = num_threads
        torch.set_num_threads(1)

    @property
    def exact_products(self) -> bool:
        return self._context.exact_products

    def set_exact_products(self, exact: bool) -> None:
        self._context.exact_products = exact

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        dtype = weight.dtype if dtype is None else dtype
        check_embedding(weight, dtype)
        if token_ids.dtype != torch.int64:
            raise TypeError(f"token_ids must be int64, not {token_ids.dtype}")
        token_ids = token_ids.contiguous()
        vocab, hidden = weight.shape
        num_tokens = token_ids.numel()
        out = torch.empty((num_tokens, hidden), dtype=dtype)
        _native.embedding(
            self._context, token_ids.data_ptr(), WEIGHT_KINDS[weight.dtype], weight.data_ptr(),
            dtype_of(out), out.data_ptr(), num_tokens, vocab, hidden,
        )  # fmt: skip
        return out

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        dtype = dtype_of(x)
        rows, hidden = rows_of(x, weight)
        x = x.contiguous()
        out = torch.empty_like(x)
        _native.rms_norm(
            self._context, dtype, x.data_ptr(), 0, weight.data_ptr(), out.data_ptr(),
            rows, hidden, eps,
        )  # fmt: skip
        return out

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        dtype = dtype_of(x)
        rows, hidden = rows_of(x, weight)
        if residual.dtype != x.dtype or residual.shape != x.shape:
            raise ValueError(
                f"residual {describe(residual)} must have the shape and dtype of x {describe(x)}"
            )
        x, residual = x.contiguous(), residual.contiguous()
        out = torch.empty_like(x)
        _native.rms_norm(
            self._context, dtype, x.data_ptr(), residual.data_ptr(), weight.data_ptr(),
            out.data_ptr(), rows, hidden, eps,
        )  # fmt: skip
        return out, residual

    def qk_norm_rope_write_kv(
        self,
        qkv: Tensor,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        q_norm: Tensor | None,
        k_norm: Tensor | None,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        write_index: Tensor,
    ) -> Tensor:
        dtype = dtype_of(qkv)
        num_tokens, width = qkv.shape
        if width != (num_heads + 2 * num_kv_heads) * head_dim:
            raise ValueError(
                f"qkv {describe(qkv)} does not hold {num_heads} + 2 * {num_kv_heads} heads "
                f"of {head_dim}"
            )
        layout = cache_layout(key_cache, value_cache, qkv, num_kv_heads, head_dim)
        check_indices(positions, "positions", num_tokens)
        check_indices(write_index, "write_index", num_tokens)
        if cos_sin.dtype != torch.float32 or not cos_sin.is_contiguous():
            raise ValueError("cos_sin must be float32 and contiguous")
        max_positions, rotary_dim = cos_sin.shape
        if rotary_dim > head_dim or rotary_dim % 2 != 0:
            raise ValueError(f"rotary_dim {rotary_dim} must be even and at most {head_dim}")
        qkv = qkv.contiguous()
        out = qkv.new_empty((num_tokens, num_heads, head_dim))
        _native.qk_norm_rope_write_kv(
            self._context, dtype, qkv.data_ptr(), out.data_ptr(), num_tokens,
            num_heads, num_kv_heads, head_dim, rotary_dim,
            address_of(q_norm, qkv, head_dim, "q_norm"),
            address_of(k_norm, qkv, head_dim, "k_norm"),
            eps, cos_sin.data_ptr(), max_positions, positions.data_ptr(), write_index.data_ptr(),
            key_cache.data_ptr(), layout.key_stride, value_cache.data_ptr(), layout.value_stride,
            layout.kv, layout.num_pages, layout.page_size,
        )  # fmt: skip
        return out

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        dtype = dtype_of(q)
        num_tokens, num_heads, head_dim = q.shape
        num_kv_heads = key_cache.shape[1]
        layout = cache_layout(key_cache, value_cache, q, num_kv_heads, head_dim)
        q_stride, head_stride, entry_stride = q.stride()
        if (head_stride != head_dim and num_heads > 1) or entry_stride != 1:
            q = q.contiguous()
            q_stride = num_heads * head_dim
        shape = (num_heads, num_kv_heads, head_dim, layout.page_size, layout.num_pages)
        window = traits.window or 0
        plan = self.plan(batch, shape, (window,))
        if plan.num_tokens != num_tokens:
            raise ValueError(
                f"q has {num_tokens} tokens but the batch's query lengths add up to "
                f"{plan.num_tokens}"
            )
        out = q.new_empty((num_tokens, num_heads, head_dim))
        plan.run(
            self._context, dtype, q.data_ptr(), q_stride, key_cache.data_ptr(), layout.key_stride,
            value_cache.data_ptr(), layout.value_stride, layout.kv, out.data_ptr(), scale,
            window, traits.soft_cap or 0.0,
            per_head(traits.sinks, num_heads, "sinks"), per_head(traits.alibi, num_heads, "alibi"),
            head_dim, 0,
        )  # fmt: skip
        return out

    def norm_rope_write_latent(self, q: Tensor, latent: Tensor, **others: Any) -> None:
        norm_rope_write_latent(self._context, q, latent, **others)

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        return latent_attention(self._context, self.plan, q, cache, batch, scale, rank)

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        return choose_keys(self._context, q, weights, cache, batch, num_chosen)

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        return sparse_latent_attention(self._context, q, cache, batch, scale, rank, chosen)

    def pack_heads(self, weight: Tensor) -> PackedHeads:
        if weight.dtype == torch.bfloat16 and weight.shape[2] % 2:
            return torch_latent.HeadProducts(weight)
        return HeadProducts(self._context, self._memory, weight)

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
    ) -> Tensor:
        return attend_both_ways(self._context, q, k, v, texts, scale)

    def norm_rotate_heads(
        self, x: Tensor, norm: Tensor | None, eps: float, rotations: Tensor | None, out: Tensor
    ) -> None:
        norm_rotate_heads(self._context, x, norm, eps, rotations, out)

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        dtype = dtype_of(x)
        rows, hidden = x.shape
        x = x.contiguous()
        out = torch.empty_like(x)
        _native.layer_norm(
            self._context, dtype, x.data_ptr(), address_of(weight, x, hidden, "weight"),
            address_of(bias, x, hidden, "bias"), out.data_ptr(), rows, hidden, eps,
        )  # fmt: skip
        return out

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        dtype = dtype_of(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        number = ACTIVATIONS[activation]
        _native.activate(self._context, dtype, number, x.data_ptr(), out.data_ptr(), x.numel())
        return out

    def add_to(self, x: Tensor, total: Tensor) -> None:
        dtype = dtype_of(total)
        if x.shape != total.shape or x.dtype != total.dtype:
            raise ValueError(f"{describe(x)} cannot be added to {describe(total)}")
        if not (x.is_contiguous() and total.is_contiguous()):
            raise ValueError("what is added and its total must be contiguous")
        _native.add_to(self._context, dtype, x.data_ptr(), total.data_ptr(), total.numel())

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        dtype = dtype_of(x)
        x = x.contiguous()
        out = torch.empty_like(x)
        _native.xielu(self._context, dtype, x.data_ptr(), out.data_ptr(), x.numel(), above, below)
        return out

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        dtype = dtype_of(x)
        rows, doubled = x.shape
        if doubled % 2 != 0:
            raise ValueError(f"x {describe(x)} must have an even number of columns")
        x = x.contiguous()
        out = x.new_empty((rows, doubled // 2))
        _native.activate_and_mul(
            self._context, dtype, ACTIVATIONS[activation], x.data_ptr(), out.data_ptr(), rows,
            doubled // 2,
        )  # fmt: skip
        return out

    def causal_conv(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        silu: bool = False,
    ) -> Tensor:
        return causal_conv(self._context, x, weight, bias, states, slots, batch, silu=silu)

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
    ) -> Tensor:
        return gated_rms_norm(self._context, x, gate, weight, form)

    def gated_delta_rule(
        self,
        qkv: Tensor,
        decay: Tensor,
        write: Tensor,
        form: DeltaForm,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
    ) -> Tensor:
        return gated_delta_rule(self._context, qkv, decay, write, form, states, slots, batch)

    def selective_scan(
        self,
        x: Tensor,
        b: Tensor,
        c: Tensor,
        dt: Tensor | None,
        layer: StateSpace,
        states: Tensor,
        slots: Tensor,
        batch: AttentionBatch,
        *,
        gate: Tensor | None = None,
    ) -> Tensor:
        return selective_scan(self._context, x, b, c, dt, layer, states, slots, batch, gate=gate)

    def carry_rows(
        self, source: Tensor, target: Tensor, from_rows: Sequence[int], to_rows: Sequence[int]
    ) -> None:
        carry_rows(self._context, source, target, from_rows, to_rows)

    def copy_rows(self, tensor: Tensor, source: Tensor, target: Tensor) -> None:
        copy_rows(tensor, source, target)

    def gate_rows(self, x: Tensor, gate: Tensor) -> None:
        rows, width = x.shape
        if gate.shape != (rows, 1) or gate.dtype != x.dtype or not x.is_contiguous():
            raise ValueError(f"gate {describe(gate)} does not fit x {describe(x)}, or x has gaps")
        gate = gate.contiguous()
        _native.gate_rows(dtype_of(x), x.data_ptr(), gate.data_ptr(), rows, width)

    def gate_columns(self, x: Tensor, gate: Tensor) -> None:
        gate_columns(self._context, x, gate)

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        return route(logits, bias, routing)

    def pack_experts(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activation: Activation,
        limit: float | None = None,
        *,
        gated: bool = True,
    ) -> PackedExperts:
        return pack_experts(
            self.context,
            self._mixture,
            gate_up,
            down,
            activation,
            limit,
            activation_of(self, activation, limit, gated=gated),
            gated=gated,
        )

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """The packed copy replaces the weight: nothing of `weight` is kept."""
        dtype = weight.dtype if dtype is None else dtype
        if dtype not in DTYPES or not weight.is_cpu or not is_held(weight.dtype, dtype):
            raise TypeError(
                f"a weight {describe(weight)} cannot be kept for activations of {dtype}"
            )
        if bias is not None and (bias.dtype != dtype or bias.numel() != weight.shape[0]):
            raise ValueError(f"bias {describe(bias)} does not fit weight {describe(weight)}")
        return Linear(self._context, self._memory, weight, bias, dtype)

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """As pack_linear: nothing of the parts is kept. Results do not depend on the number of rows
        or threads, nor on the instruction set if it multiplies and adds in one rounding."""
        code = DTYPES.get(dtype)
        if code is None:
            raise TypeError(f"{dtype} is neither float32 nor bfloat16")
        return QuantizedLinear(self._context, self._memory, parts, bias, dtype=dtype, code=code)

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        return NativeLowRank(self._context, in_size, out_size)

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        return quantize_weight(self._context, weight, kind, DTYPES.get(weight.dtype))

    def argmax(self, logits: Tensor) -> Tensor:
        dtype = dtype_of(logits)
        rows, vocab = logits.shape
        if vocab == 0:
            raise ValueError(f"logits {describe(logits)} have no columns")
        logits = logits.contiguous()
        out = torch.empty(rows, dtype=torch.int64)
        _native.argmax(self._context, dtype, logits.data_ptr(), rows, vocab, out.data_ptr())
        return out

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        dtype = dtype_of(logits)
        num_rows, vocab = logits.shape
        if vocab > 1 and logits.stride(1) != 1:
            raise ValueError(f"the rows of logits {describe(logits)} are not contiguous")
        if masks.shape != (len(rows), -(-vocab // 32)) or masks.dtype != torch.int32:
            raise ValueError(f"masks {describe(masks)} do not fit {len(rows)} rows of {vocab}")
        if not masks.is_contiguous():
            raise ValueError(f"masks {describe(masks)} are not contiguous")
        _native.mask_logits(
            self._context, dtype, logits.data_ptr(), num_rows, logits.stride(0), vocab,
            masks.data_ptr(), list(rows),
        )  # fmt: skip

    def soft_cap(self, logits: Tensor, cap: float) -> None:
        soft_cap(logits, cap)

    def penalise(
        self,
        logits: Tensor,
        ids: Tensor,
        counts: Tensor,
        *,
        repetition: float,
        frequency: float,
        presence: float,
    ) -> None:
        penalise(logits, ids, counts, repetition=repetition, frequency=frequency, presence=presence)

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        dtype = dtype_of(logits)
        rows, vocab = logits.shape
        if rows != len(settings) or vocab == 0:
            raise ValueError(
                f"logits {describe(logits)} do not fit settings of {len(settings)} rows"
            )
        logits = logits.contiguous()
        out = torch.empty(rows, dtype=torch.int64)
        _native.sample_rows(
            self._context, dtype, logits.data_ptr(), vocab, settings.temperature, settings.top_k,
            settings.top_p, settings.min_p, settings.numbers, out.data_ptr(),
        )  # fmt: skip
        return out

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor:
        return self.sample(logits, SamplingSettings.of_table(table.cpu().numpy()))

    def captured_sharing(self, num_requests: int, page_size: int, device: torch.device) -> None:
        return None

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> None:
        return None

    def record(
        self,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> RecordedStep:
        return NativeStep(self, program, kv_caches, group_of_layer)

    def plan(
        self,
        batch: AttentionBatch,
        shape: tuple[int, int, int, int, int],
        windows: tuple[int, ...] = (0,),
    ) -> _native.AttentionPlan:
        """Who does which part of a step's attention; made when first asked for, kept in the batch.

        shape    (query heads, key/value heads, head size, page size, pages of the cache)
        windows  of layers that will attend; 0 for those without. Each is prepared once
        Raises   ValueError, IndexError if lengths do not fit, or pages that a window reaches
        """
        plans = cast(
            dict[tuple[int, ...], "_native.AttentionPlan"], batch.cache.setdefault("cpu_plans", {})
        )
        plan = plans.get(shape)
        if plan is None:
            num_heads, num_kv_heads, _, page_size, _ = shape
            plan = plans[shape] = _native.AttentionPlan(
                self._context, *shape, *table_of(batch), batch.query_lens, batch.context_lens,
                groups_of_decodes(batch, page_size, num_heads // num_kv_heads),
                0 if batch.sees is None else batch.sees.data_ptr(),
            )  # fmt: skip
        for window in windows:
            plan.prepare(window)
        return plan


def with_isa(isa: str) -> CpuKernels:
    """The kernels with a given instruction set; ValueError if this machine cannot run it."""
    return CpuKernels(isa=isa)
