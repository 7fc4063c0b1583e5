"""The ops that layers call, with the signatures that every implementation has.

Shapes use: T new tokens of all requests, R requests, Hq query heads, Hk key and value heads, D head
size.

The KV cache of one layer is a pair of tensors [num_pages, Hk, page_size, D]: one page holds
page_size consecutive tokens of one request, and the tokens of one head lie together in it: a head's
part of a page is one contiguous tile. A token's `write_index` is page * page_size + offset within
the page. A cache of an 8-bit dtype (`kernels/kv_cache.py`) is [num_pages, Hk, page_size, D + 2],
since its tiles hold numbers and then scales; every op takes either kind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from sapwood.base.dtypes import DTYPE_BYTES, KV_CACHE_8_BIT, KV_SCALE_BYTES
from sapwood.kernels.activations import Activation
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.kv_cache import is_8_bit
from sapwood.kernels.low_rank import AdapterRoom, CapturedAdapters, LowRankLayer
from sapwood.kernels.packed import PackedExperts, PackedHeads, PackedLinear
from sapwood.kernels.quantized import QuantizedWeight
from sapwood.kernels.recording import Program, RecordedStep
from sapwood.kernels.routing import Routing
from sapwood.kernels.sampling_settings import SamplingSettings
from sapwood.kernels.state_forms import DeltaForm, GatedNormForm
from sapwood.kernels.state_space import StateSpace
from sapwood.kernels.texts import EqualTexts


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionBatch:
    """Which keys each new token attends to. Made once per step, used by every layer.

    Requests come in the order of their new tokens; the first `num_decodes` have exactly one each.

    page_table      [R, max_pages] int32; page_table[r, i] holds tokens i*page_size .. of request r;
                    unused entries are 0 (a valid page, so that a gather of them is harmless). Where
                    attention has a window, entries of pages before it may be anything: such pages
                    may have been given away
    query_start     [R + 1] int32; the new tokens of request r are the rows from query_start[r] on,
                    up to query_start[r + 1]
    context_len     [R] int32; tokens of request r whose KV is in the cache after this step; its new
                    tokens are the last ones, and attention is causal among them
    query_lens      the same lengths on the host, as Python ints
    context_lens    the same, on the host
    cache           what an implementation computes once per step and reuses in every layer
    host_page_table page_table on the host, for implementations that look for pages which several
                    requests share; None: it is not at hand, or not to be looked at
    sees            [T] int64, for requests whose new tokens are a tree (schema/draft_tree.py):
                    bit j of a token is 1 if it sees its request's new token j, itself included.
                    A token that sees all new tokens up to itself has -1; so have all tokens of a
                    request with more than 64 new ones. Earlier tokens are always seen.
                    `paged_attention` without a window and without ALiBi takes it, no other
                    attention does. None: every token has -1
    """

    page_table: Tensor
    query_start: Tensor
    context_len: Tensor
    query_lens: tuple[int, ...]
    context_lens: tuple[int, ...]
    num_decodes: int
    cache: dict[str, Any] = field(default_factory=dict)
    host_page_table: NDArray[np.int32] | None = None
    sees: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AttentionTraits:
    """What the attention of a layer does beyond scores, causal mask and softmax.

    window    a token sees the last `window` tokens, itself included; None: all (Beltagy et al.
              2020, arXiv:2004.05150)
    soft_cap  a scaled score s becomes soft_cap * tanh(s / soft_cap) before it is masked; None: it
              stays as it is (Gemma Team 2024, arXiv:2408.00118)
    sinks     [Hq] fp32, one more score per query head, which has no value: it only takes its share
              of the softmax (OpenAI 2025, arXiv:2508.10925); None: there are none
    alibi     [Hq] fp32 slopes: slope * (position of the key - position of the query) is added to a
              scaled and capped score (Press et al. 2021, arXiv:2108.12409); None: nothing is
    Raises    ValueError if window or soft_cap is not positive

    sinks and alibi are contiguous.
    """

    window: int | None = None
    soft_cap: float | None = None
    sinks: Tensor | None = None
    alibi: Tensor | None = None

    def __post_init__(self) -> None:
        for name, number in (("window", self.window), ("soft_cap", self.soft_cap)):
            if number is not None and number <= 0:
                raise ValueError(f"{name} must be positive, got {number}; None means without it")

    @property
    def features(self) -> frozenset[str]:
        """Their names, as `Need.attention` has them; empty if attention is plain."""
        there = {
            SLIDING_WINDOW: self.window, SOFT_CAP: self.soft_cap, SINKS: self.sinks,
            ALIBI: self.alibi,
        }  # fmt: skip
        return frozenset(name for name, value in there.items() if value is not None)


SLIDING_WINDOW = "sliding window"
SOFT_CAP = "logit soft cap"
SINKS = "attention sinks"
ALIBI = "ALiBi"
LATENT = "latent rows"
"""The layers call `latent_attention`; a feature that no trait stands for."""
CHOSEN_KEYS = "attention to chosen keys"
"""The layers call `choose_keys` and `sparse_latent_attention`; likewise."""
PLAIN = AttentionTraits()


def lacking(features: frozenset[str], has: frozenset[str]) -> str | None:
    """Why kernels whose attention `has` certain features cannot serve those that are needed; None
    if they can."""
    missing = sorted(features - has)
    return f"its attention has no {' and no '.join(missing)}" if missing else None


class CapturedSharing(Protocol):
    """Pages that several requests of a captured decode share: found on the host before a replay,
    and read once by what was captured."""

    def install(self, batch: AttentionBatch) -> None:
        """Attention to `batch`, which is captured, is to follow the plan of each replay."""
        ...

    def plan(self, batch: AttentionBatch) -> bool:
        """For the step that is replayed next. False, and nothing done, if sharing saves nothing
        worth it: then a capture without this is to be replayed."""
        ...


class Kernels(Protocol):
    """The ops of one platform. All tensors of a call are on one device.

    multiplies_quantized  whether `pack_quantized_linear` keeps weights quantised; else it
                          dequantises them, and they are no smaller than dense ones
    can_be_captured       whether a batch's sizes are read from its tensors alone, so that what a
                          device captured of these ops stays right for other batches; the numbers
                          that `AttentionBatch` has on the host are then upper bounds of decodes
    captures_experts      whether `pack_experts` gives what can be captured, at least if all experts
                          are stored alike
    isa                   the instruction set used, or "" for those that have no choice
    """

    name: str
    multiplies_quantized: bool
    can_be_captured: bool
    captures_experts: bool

    @property
    def isa(self) -> str: ...

    def embedding(
        self, token_ids: Tensor, weight: Tensor, dtype: torch.dtype | None = None
    ) -> Tensor:
        """token_ids [T] int64, weight [vocab, hidden] -> [T, hidden] of `dtype`, by default the
        weight's own, which may be narrower."""
        ...

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """x [T, hidden] -> x / rms(x) * weight; the mean of squares is taken in fp32.
        Source: Zhang and Sennrich 2019, arXiv:1910.07467."""
        ...

    def add_rms_norm(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(rms_norm(x + residual), x + residual); `residual` may be overwritten with the sum."""
        ...

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
        """Optional RMSNorm of each q and k head, rotary embedding, and the KV write, in one pass.

        qkv          [T, (Hq + 2 Hk) * D]: q heads, then k heads, then v heads; may be overwritten.
                     Hk may be 0, with caches that have no heads: nothing is written then
        q_norm       [D] or None (Qwen3's norm over each head); k_norm likewise
        cos_sin      [max_positions, rotary_dim] fp32: cos in the first half, sin in the second;
                     rotates the first rotary_dim entries of a head, halves paired (NeoX style)
        positions    [T] int64
        key_cache    [num_pages, Hk, page_size, D], or in 8 bits; written at write_index [T] int64
        Returns      q [T, Hq, D]
        Source: Su et al. 2021, arXiv:2104.09864."""
        ...

    def paged_attention(
        self,
        q: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        traits: AttentionTraits = PLAIN,
    ) -> Tensor:
        """Causal attention of new tokens over paged keys and values.

        q [T, Hq, D] -> [T, Hq, D]; softmax in fp32. Hq is a multiple of Hk (grouped queries).
        `Need.attention` names the traits of a model, so that kernels are chosen that have them.
        With a window, keys before it are not read, and the work per token is that of the window.
        Source: Kwon et al. 2023, arXiv:2309.06180."""
        ...

    def norm_rope_write_latent(
        self,
        q: Tensor,
        latent: Tensor,
        *,
        norm: Tensor,
        eps: float,
        cos_sin: Tensor,
        positions: Tensor,
        cache: Tensor,
        write_index: Tensor,
    ) -> None:
        """The rotation of queries, and the write of rows of latent attention, in one pass.

        q            [T, Hq, N + P], where Hq may be 0; the last P entries of each head are rotated
                     in place
        latent       [T, C + P]: C entries that get an RMSNorm, then P that are rotated. It may be
                     some of the columns of a wider tensor
        norm         [C], where C may be 0
        cos_sin      [max_positions, rotary_dim] fp32, rotary_dim <= P, as in qk_norm_rope_write_kv
        positions    [T] int64
        cache        [num_pages, 1, page_size, C + P], or in 8 bits; written at write_index [T]
        Source: DeepSeek-AI 2024, arXiv:2405.04434."""
        ...

    def latent_attention(
        self, q: Tensor, cache: Tensor, batch: AttentionBatch, scale: float, rank: int
    ) -> Tensor:
        """Causal attention of new tokens over paged rows, in the absorbed form (kernels/latent).

        All heads read the same rows: a row is the key, and its first `rank` entries are the value.

        q [T, Hq, D], cache [num_pages, 1, page_size, D], or in 8 bits -> [T, Hq, rank]; softmax in
        fp32. Source: DeepSeek-AI 2024, arXiv:2405.04434."""
        ...

    def choose_keys(
        self, q: Tensor, weights: Tensor, cache: Tensor, batch: AttentionBatch, num_chosen: int
    ) -> Tensor:
        """The keys with the highest scores of those that each new token sees: the sum over heads
        of weight * relu(q * key), in fp32.

        q        [T, H, D]; weights [T, H] fp32
        cache    [num_pages, 1, page_size, D], or in 8 bits: a key per token
        Returns  [T, num_chosen] int64: positions in the token's request, ascending; then -1, where
                 the token sees fewer
        Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp."""
        ...

    def sparse_latent_attention(
        self,
        q: Tensor,
        cache: Tensor,
        batch: AttentionBatch,
        scale: float,
        rank: int,
        chosen: Tensor,
    ) -> Tensor:
        """As latent_attention, of each token to the rows at `chosen` alone, as choose_keys has
        them. Source: as there."""
        ...

    def pack_heads(self, weight: Tensor) -> PackedHeads:
        """weight [Hq, out, in] -> a linear layer of each head, packed once."""
        ...

    def bidirectional_attention(
        self, q: Tensor, k: Tensor, v: Tensor, texts: Sequence[EqualTexts], scale: float
    ) -> Tensor:
        """Attention of every token to all tokens of its text, without a cache.

        q, k, v [T, H, D] -> [T, H, D]; `texts` are all texts of the step (`group_texts`).
        Source: Vaswani et al. 2017, arXiv:1706.03762."""
        ...

    def layer_norm(
        self, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> Tensor:
        """x [T, hidden] -> (x - mean(x)) / deviation(x) * weight + bias; mean and variance are
        taken in fp32. weight and bias are [hidden] of x's dtype, or None: 1 and 0.
        Source: Ba et al. 2016, arXiv:1607.06450."""
        ...

    def activate(self, x: Tensor, activation: Activation) -> Tensor:
        """x [T, I] -> activation(x), computed in fp32."""
        ...

    def xielu(self, x: Tensor, above: float, below: float) -> Tensor:
        """x [T, I] -> above x² + x / 2 where x is more than 0, else below (e^x - 1 - x) + x / 2,
        computed in fp32. Source: Huang and Schlag 2024, arXiv:2411.13010."""
        ...

    def activate_and_mul(self, x: Tensor, activation: Activation) -> Tensor:
        """x [T, 2 * I] -> activation(x[:, :I]) * x[:, I:]. Source: Shazeer 2020,
        arXiv:2002.05202."""
        ...

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
        """Convolution of each channel over the last L inputs of its request: out[t] is the bias
        plus the sum over i of weight[:, i] * input[t - L + 1 + i]; with `silu`, SiLU of that.

        x        [T, C]: the inputs of the new tokens
        weight   [C, L], the newest input's factor last, or [T, C, L], those of each token's output;
                 bias [C] or None
        states   [num_slots, C, L - 1] of x's dtype: a request's newest inputs before this step, the
                 newest last; overwritten with the newest ones after it
        slots    [R] int64: which state is whose; different ones
        batch    of it the lengths. A request whose new tokens are all of its tokens begins with
                 zeros, whatever its state holds
        Returns  [T, C]
        Source: Gu and Dao 2023, arXiv:2312.00752 (the convolution of Mamba)."""
        ...

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
        """A state space layer. Of each head, state = exp(rate * step) * state + key * (step *
        value), and then the output is query @ state + skip * value, token by token; a token's step
        is softplus(dt + dt_bias), cut to the layer's range. Computed in fp32.

        x        [T, H * P]: the values, one of P entries per head
        b, c     [T, G * N]: the keys and the queries of the groups of heads
        dt       [T, as many as `layer.num_steps`]; None: the layer has no time steps
        states   [num_slots, H, N, P], fp32 or bf16; overwritten as in causal_conv
        gate     [T, H * P]: SiLU of it multiplies the output; None: nothing does
        slots, batch  as in causal_conv
        Returns  [T, H * P]; rows of inputs may lie apart, but not entries of a row
        Sources  Gu and Dao 2023, arXiv:2312.00752; Dao and Gu 2024, arXiv:2405.21060; Qin et al.
                 2024, arXiv:2401.04658 (lightning attention)"""

    def gated_rms_norm(
        self, x: Tensor, gate: Tensor, weight: Tensor, form: GatedNormForm
    ) -> Tensor:
        """RMSNorms of groups of columns and a gate, as `form` says, in fp32.

        x [T, W]; gate [T, W] of the same dtype, whose rows may lie apart; weight [W] of that dtype
        Returns  [T, W]
        Raises   ValueError if groups of form.group columns do not fill W
        Source: Sun et al. 2023, arXiv:2307.08621; Dao and Gu 2024, arXiv:2405.21060."""
        ...

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
        """Linear attention whose state S [key_dim, value_dim] per head forgets, and then corrects
        what it would have answered to the newest key. For each token, with queries and keys of
        length 1, g = e^(-rate * softplus(decay + shift)), or as form.lowest says, and
        b = write_scale * logistic(write):

            S = g * S                              (g per head, or per row of S)
            S = S + k (b * (v - k^T S))^T
            out = q^T S / sqrt(key_dim)

        All of it is computed in fp32.

        qkv     [T, form.num_channels]: all queries, all keys, all values
        decay   [T, as many as form.shift], and write [T, H]: their inputs; rows may lie apart
        states  [num_slots, H, key_dim, value_dim] fp32 or bf16, rounded to that after the step
        slots   [R] int64, and batch, as for `causal_conv`
        Returns [T, H * value_dim] of qkv's dtype
        Source: Yang et al. 2024, arXiv:2412.06464; per channel: Kimi Team 2025, arXiv:2510.26692.
        """
        ...

    def copy_rows(self, tensor: Tensor, source: Tensor, target: Tensor) -> None:
        """tensor[target[i]] = tensor[source[i]] for all i at once, in place: every row is read
        before any is written, so that no pair reads what another one wrote.

        tensor  [N, ...], for instance pages or states
        source  [n] int64; target likewise, different ones"""
        ...

    def gate_rows(self, x: Tensor, gate: Tensor) -> None:
        """x [T, n] *= the logistic function of gate [T, 1], in fp32 and in place. x is contiguous,
        and both have one dtype."""
        ...

    def gate_columns(self, x: Tensor, gate: Tensor) -> None:
        """x [T, n] *= the logistic function of gate [T, n], in fp32 and in place. x is contiguous,
        and both have one dtype; rows of the gate may lie apart."""
        ...

    def route(self, logits: Tensor, bias: Tensor | None, routing: Routing) -> tuple[Tensor, Tensor]:
        """The experts of each token by a router's rule, in fp32, and their weights.

        logits   [T, num_experts] of a float dtype
        bias     the correction bias [num_experts] fp32, or None
        Returns  (weights [T, k] fp32, experts [T, k] int64), in the order of the choice
        Raises   ValueError if the rule does not fit the number of experts"""
        ...

    def pack_experts(
        self,
        gate_up: Sequence[PackedLinear],
        down: Sequence[PackedLinear],
        activation: Activation,
        limit: float | None = None,
        *,
        gated: bool = True,
    ) -> PackedExperts:
        """The experts of a mixture, of linear layers that these kernels have packed.

        gate_up  of each expert: hidden -> 2 * I, the gate's outputs first, or if not `gated`, I; in
                 any format
        down     of each expert: I -> hidden
        limit    before the activation the gate becomes at most that, and up becomes 1 + what is
                 left of it between -limit and limit (OpenAI 2025, arXiv:2508.10925); None: they
                 stay as they are
        Raises   ValueError if there are not as many of one as of the other"""
        ...

    def pack_linear(
        self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype | None = None
    ) -> PackedLinear:
        """weight [out, in], bias [out] of `dtype` or None -> the layer, packed once.

        dtype  of the x that it is called with, by default the weight's own. With a narrower weight
               the products are those of the weight in `dtype`"""
        ...

    def pack_quantized_linear(
        self, parts: Sequence[LinearPart], bias: Tensor | None, dtype: torch.dtype
    ) -> PackedLinear:
        """Quantised weights -> the layer, packed once; called with x of `dtype`.

        parts  each [its outputs, in], of any kinds; the layer's outputs are theirs in this order
        bias   [all outputs] of `dtype`, or None

        kernels/quantized.py and kernels/coded.py state the formats and what the products are."""
        ...

    def low_rank(self, in_size: int, out_size: int) -> LowRankLayer:
        """Adapters' additions to a linear layer of these sizes, none at first."""
        ...

    def quantize_weight(self, weight: Tensor, kind: str) -> QuantizedWeight:
        """weight [out, in] of a float dtype -> "int8", "q8_0" or "q4_1"; see
        kernels/quantized.py. (kernels/coded.py quantises to codes, the same for all kernels.)

        Raises ValueError for another kind, or if the inputs do not fit it."""
        ...

    def argmax(self, logits: Tensor) -> Tensor:
        """logits [S, vocab] -> [S] int64: each row's largest entry, the first of equal ones."""
        ...

    def mask_logits(self, logits: Tensor, masks: Tensor, rows: Sequence[int]) -> None:
        """logits[rows[i], t] becomes -inf, in place, where bit t % 32 of masks[i, t // 32] is 0.

        logits  [S, vocab] of a float dtype
        masks   [n, ceil(vocab / 32)] int32 on the host, contiguous; bits beyond vocab are ignored
        rows    n different rows of logits
        """
        ...

    def soft_cap(self, logits: Tensor, cap: float) -> None:
        """logits [S, vocab] fp32 become cap * tanh(logits / cap), in place.
        Source: Gemma Team 2024, arXiv:2408.00118."""
        ...

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
        """Change logits[ids], in place, as their tokens were seen: those above 0 are divided by
        `repetition` and the others multiplied by it; then frequency * count is subtracted, and
        `presence` where the count is above 0.

        logits  [vocab] of one row, of a float dtype
        ids     [n] int64, different ones
        counts  [n] fp32: how often each is in the output
        Source of the repetition penalty: Keskar et al. 2019, arXiv:1909.05858."""
        ...

    def sample(self, logits: Tensor, settings: SamplingSettings) -> Tensor:
        """logits [S, vocab] -> [S] int64: one token of each row at random, by its `settings`.

        A row's token depends on that row alone."""
        ...

    def sample_with(self, logits: Tensor, table: Tensor) -> Tensor:
        """As `sample`, by `SamplingSettings.table` [5, S] fp64 on the device of the logits, where
        kernels that `can_be_captured` leave it."""
        ...

    def captured_sharing(
        self, num_requests: int, page_size: int, device: torch.device
    ) -> CapturedSharing | None:
        """For a captured decode of so many requests; None if attention shares no pages in one."""
        ...

    def captured_adapters(
        self, room: AdapterRoom, dtype: torch.dtype, device: torch.device
    ) -> CapturedAdapters | None:
        """For captured steps with activations of `dtype`; None: such steps have no adapters."""
        ...

    def record(
        self,
        program: Program,
        kv_caches: Sequence[tuple[Tensor, ...]],
        group_of_layer: Sequence[int] = (),
    ) -> RecordedStep:
        """The whole step of a decoder as one call.

        kv_caches       per layer: keys and values, or states
        group_of_layer  per layer the index of its cache group, which has pages of its own; empty:
                        all layers are of one group

        Raises CannotRecord if these kernels have no such call for it."""
        ...

    def set_num_threads(self, num_threads: int) -> None:
        """Threads that compute an op on a CPU, the caller included."""
        ...


def kv_cache_shape(
    num_pages: int,
    num_kv_heads: int,
    page_size: int,
    head_dim: int,
    dtype: torch.dtype = torch.float32,
) -> tuple[int, int, int, int]:
    """The shape of one layer's key cache, and of its value cache, of `dtype`."""
    width = head_dim + KV_SCALE_BYTES if is_8_bit(dtype) else head_dim
    return (num_pages, num_kv_heads, page_size, width)


DTYPES: dict[str, torch.dtype] = {name: getattr(torch, name) for name in DTYPE_BYTES}

KV_CACHE_DTYPES: dict[str, torch.dtype] = {
    **DTYPES,
    **{name: getattr(torch, torch_name) for name, torch_name in KV_CACHE_8_BIT.items()},
}
