"""The compiled module. Addresses are tensors' data_ptr(); strides and sizes count elements."""

from collections.abc import Sequence
from typing import overload

COMPILED_ISAS: str
HEAD_DIM_STEP: int
MAX_HEAD_DIM: int
MAX_CONV_LENGTH: int
MAX_STATE_SIZE: int
PANEL: int

def usable_isas() -> list[str]: ...

class Context:
    isa: str
    threads: int
    exact_products: bool
    def __init__(self, isa: str, threads: int) -> None: ...

class SharedSums:
    def __init__(self, memory: int, rank: int, ranks: int, capacity: int, /) -> None: ...
    @staticmethod
    def bytes(ranks: int, capacity: int, /) -> int: ...
    def add_up(self, dtype: int, x: int, n: int, /) -> None: ...
    def gather(self, x: int, out: int, rows: int, row_bytes: int, /) -> None: ...
    def exchange(self, x: int, out: int, sizes: int, /) -> None: ...
    def stop(self) -> None: ...

class AttentionPlan:
    num_tokens: int
    def __init__(
        self,
        context: Context,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        page_size: int,
        num_pages: int,
        page_table: int,
        page_table_stride: int,
        max_pages: int,
        query_lens: list[int] | tuple[int, ...],
        context_lens: list[int] | tuple[int, ...],
        groups: list[tuple[tuple[int, ...], int]],
        sees: int,
        /,
    ) -> None: ...
    def run(
        self,
        context: Context,
        dtype: int,
        q: int,
        q_stride: int,
        keys: int,
        key_stride: int,
        values: int,
        value_stride: int,
        kv: int,
        out: int,
        scale: float,
        window: int,
        soft_cap: float,
        sinks: int,
        alibi: int,
        value_dim: int,
        page_size: int,
        /,
    ) -> None: ...
    def prepare(self, window: int, /) -> None: ...
    def num_tasks(self, window: int, /) -> int: ...
    def num_merges(self, window: int, /) -> int: ...

_Heads = tuple[int, int, int]
_Adapters = tuple[list[int], list[int], int]
_Cache = tuple[int, int, int, int, int, int, int]
_GatedNorm = tuple[int, int, float, bool, bool]
_Columns = tuple[int, int, int]
_Delta = tuple[int, int, int, int, bool, int, int, float, float, float]
_States = tuple[int, int, int, int]
_Latent = tuple[int, int, int, int, int, float, int, int, int]
_LatentRows = tuple[int, int, int, int, int]
_Scan = tuple[int, int, int, int, bool, int, int, int, float, float]

class HeadProducts:
    def __init__(self, weights: list[LinearWeight], /) -> None: ...
    def run(
        self,
        context: Context,
        dtype: int,
        x: int,
        x_token: int,
        x_head: int,
        out: int,
        out_token: int,
        out_head: int,
        tokens: int,
        kept: int,
        /,
    ) -> None: ...

class RecordedStep:
    """Places are indices into `widths`; see csrc/step.h."""

    def __init__(self, dtype: int, widths: list[int], /) -> None: ...
    def select(self) -> None: ...
    def embed(
        self,
        kind: int,
        weight: int,
        vocab: int,
        hidden: int,
        scale: float,
        index: int,
        out: int,
        /,
    ) -> None: ...
    def norm(
        self,
        x: int,
        residual: int,
        centered: bool,
        weight: int,
        bias: int,
        width: int,
        eps: float,
        out: int,
        /,
    ) -> None: ...
    def multiply(self, x: int, weight: LinearWeight, out: int, /) -> None: ...
    def low_rank(
        self, x: int, x_width: int, layer: LowRankLayer, out: int, out_width: int, /
    ) -> None: ...
    def rotate_and_write(
        self,
        x: int,
        heads: _Heads,
        q_norm: int,
        k_norm: int,
        eps: float,
        cos_sin: int,
        max_positions: int,
        rotary_dim: int,
        cache: _Cache,
        group: int,
        out: int,
        /,
    ) -> None: ...
    def attend(
        self,
        x: int,
        heads: _Heads,
        plan: int,
        cache: _Cache,
        scale: float,
        traits: tuple[int, float, int, int],
        out: int,
        value_dim: int,
        sparse: bool,
        /,
    ) -> None: ...
    def convolve(
        self,
        x: int,
        x_width: int,
        first: int,
        gated: bool,
        silu: bool,
        channels: int,
        length: int,
        weight: int,
        weights: int,
        bias: int,
        states: int,
        state_stride: int,
        num_slots: int,
        group: int,
        out: int,
        /,
    ) -> None: ...
    def activate(self, x: int, activation: int, gated: bool, width: int, out: int, /) -> None: ...
    def add(
        self, x: int, width: int, residual: int, first: int, residual_width: int, /
    ) -> None: ...
    def join(self, x: int, x_width: int, y: int, y_width: int, out: int, /) -> None: ...
    def resize_heads(
        self, x: int, x_width: int, first: int, count: int, size: int, new_size: int, out: int, /
    ) -> None: ...
    def scale(self, residual: int, width: int, factor: float, /) -> None: ...
    def gate_columns(
        self, gate: int, first: int, gate_width: int, residual: int, width: int, /
    ) -> None: ...
    def gated_norm(
        self,
        x: int,
        gate: int,
        first: int,
        gate_width: int,
        weight: int,
        form: _GatedNorm,
        out: int,
        /,
    ) -> None: ...
    def scan(
        self,
        inputs: Sequence[_Columns],
        form: _Scan,
        states: _States,
        group: int,
        out: int,
        /,
    ) -> None: ...
    def delta_rule(
        self,
        qkv: int,
        decay: _Columns,
        write: _Columns,
        form: _Delta,
        states: _States,
        group: int,
        out: int,
        /,
    ) -> None: ...
    def gate_rows(self, gate: int, residual: int, parts: int, width: int, /) -> None: ...
    def rotate_latent(
        self, x: int, x_width: int, q: int, form: _Latent, rows: _LatentRows, group: int, /
    ) -> None: ...
    def multiply_heads(self, x: int, layer: HeadProducts, kept: int, out: int, /) -> None: ...
    def choose_keys(
        self,
        x: int,
        q: int,
        weights: LinearWeight,
        scale: float,
        num_heads: int,
        head_dim: int,
        keys: _LatentRows,
        num_chosen: int,
        group: int,
        /,
    ) -> None: ...
    def take_columns(self, x: int, x_width: int, first: int, width: int, out: int, /) -> None: ...
    def mix(
        self,
        x: int,
        taken: int,
        router: LinearWeight,
        bias: int,
        routing: _Routing,
        num_identity: int,
        layers: ExpertLayers,
        gate_up_additions: list[LowRankLayer],
        down_additions: list[LowRankLayer],
        out: int,
        /,
    ) -> None: ...
    def add_positions(
        self, residual: int, table: int, first: int, num_positions: int, width: int, /
    ) -> None: ...
    def norm_columns(
        self,
        residual: int,
        columns: tuple[int, int, int, int],
        centered: bool,
        weight: int,
        bias: int,
        eps: float,
        /,
    ) -> None: ...
    def scale_columns(
        self, residual: int, width: int, first: int, size: int, factors: int, shifts: int, /
    ) -> None: ...
    def scale_by_position(
        self, residual: int, width: int, factors: int, num_positions: int, /
    ) -> None: ...
    def clip(self, residual: int, width: int, limit: float, /) -> None: ...
    def xielu(self, x: int, above: float, below: float, width: int, out: int, /) -> None: ...
    def keep_states(self, x: int, more: int, width: int, first: int, total: int, /) -> None: ...
    def select_rows(self, x: int, width: int, out: int, /) -> None: ...
    def logits(
        self, x: int, weight: LinearWeight, additions: LowRankLayer | None, vocab: int, /
    ) -> None: ...
    def run(
        self,
        context: Context,
        plans: list[AttentionPlan],
        token_ids: int,
        positions: int,
        write_index: list[int],
        num_tokens: int,
        logits_index: int,
        num_logits: int,
        logits: int,
        slots: list[int],
        query_start: int,
        context_len: int,
        num_requests: int,
        adapters: _Adapters,
        selected: _Adapters,
        states: int,
        vectors: list[int],
        tables: list[tuple[int, int, int]],
        /,
    ) -> None: ...

def norm_rope_write_latent(
    context: Context,
    dtype: int,
    q: int,
    latent: int,
    latent_stride: int,
    tokens: int,
    form: _Latent,
    positions: int,
    write_index: int,
    rows: _LatentRows,
    /,
) -> None: ...
def choose_keys(
    context: Context,
    dtype: int,
    q: int,
    weights: int,
    num_heads: int,
    head_dim: int,
    keys: _LatentRows,
    page_table: tuple[int, int, int],
    query_lens: list[int] | tuple[int, ...],
    context_lens: list[int] | tuple[int, ...],
    num_chosen: int,
    out: int,
    /,
) -> None: ...
def embedding(
    context: Context,
    token_ids: int,
    kind: int,
    weight: int,
    dtype: int,
    out: int,
    tokens: int,
    vocab: int,
    hidden: int,
    /,
) -> None: ...
def attend_both_ways(
    context: Context,
    dtype: int,
    qkv: tuple[int, int, int],
    strides: tuple[int, int, int],
    shape: tuple[int, int, int],
    scale: float,
    texts: list[tuple[int, int, int]],
    out: int,
    /,
) -> None: ...
def rms_norm(
    context: Context,
    dtype: int,
    x: int,
    residual: int,
    weight: int,
    out: int,
    rows: int,
    hidden: int,
    eps: float,
    /,
) -> None: ...
def norm_rotate_heads(
    context: Context,
    dtype: int,
    x: int,
    x_stride: int,
    norm: int,
    eps: float,
    rotations: int,
    out: int,
    rows: int,
    num_heads: int,
    head_dim: int,
    /,
) -> None: ...
def causal_conv(
    context: Context,
    dtype: int,
    x: int,
    weight: int,
    weight_stride: int,
    bias: int,
    states: int,
    state_stride: int,
    num_slots: int,
    slots: int,
    query_start: int,
    context_len: int,
    num_requests: int,
    num_tokens: int,
    channels: int,
    length: int,
    x_stride: int,
    silu: bool,
    out: int,
    /,
) -> None: ...
def gate_columns(
    context: Context, dtype: int, x: int, gate: int, gate_stride: int, rows: int, width: int, /
) -> None: ...
def gated_rms_norm(
    context: Context,
    dtype: int,
    x: int,
    gate: int,
    gate_stride: int,
    weight: int,
    rows: int,
    form: _GatedNorm,
    out: int,
    /,
) -> None: ...
def gated_delta_rule(
    context: Context,
    dtype: int,
    qkv: _Columns,
    decay: _Columns,
    write: _Columns,
    form: _Delta,
    states: _States,
    slots: int,
    query_start: int,
    context_len: int,
    num_requests: int,
    num_tokens: int,
    out: int,
    /,
) -> None: ...
def scan(
    context: Context,
    dtype: int,
    inputs: Sequence[_Columns],
    form: _Scan,
    states: _States,
    slots: int,
    query_start: int,
    context_len: int,
    num_requests: int,
    num_tokens: int,
    out: int,
    /,
) -> None: ...
def layer_norm(
    context: Context,
    dtype: int,
    x: int,
    weight: int,
    bias: int,
    out: int,
    rows: int,
    hidden: int,
    eps: float,
    /,
) -> None: ...
def carry_rows(
    context: Context,
    source: int,
    source_stride: int,
    target: int,
    target_stride: int,
    num_bytes: int,
    pairs: int,
    n: int,
    /,
) -> None: ...
def add_to(context: Context, dtype: int, x: int, total: int, n: int, /) -> None: ...
def activate(
    context: Context, dtype: int, activation: int, x: int, out: int, n: int, /
) -> None: ...
def xielu(
    context: Context, dtype: int, x: int, out: int, n: int, above: float, below: float, /
) -> None: ...
def activate_and_mul(
    context: Context,
    dtype: int,
    activation: int,
    x: int,
    out: int,
    rows: int,
    inner: int,
    /,
) -> None: ...
def argmax(context: Context, dtype: int, x: int, rows: int, columns: int, out: int, /) -> None: ...
def mask_logits(
    context: Context,
    dtype: int,
    x: int,
    num_rows: int,
    stride: int,
    columns: int,
    masks: int,
    rows: list[int],
    /,
) -> None: ...
def sample_rows(
    context: Context,
    dtype: int,
    logits: int,
    vocab: int,
    temperatures: Sequence[float],
    top_ks: Sequence[int],
    top_ps: Sequence[float],
    min_ps: Sequence[float],
    numbers: Sequence[float],
    out: int,
    /,
) -> None: ...
def qk_norm_rope_write_kv(
    context: Context,
    dtype: int,
    qkv: int,
    q_out: int,
    tokens: int,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    rotary_dim: int,
    q_norm: int,
    k_norm: int,
    eps: float,
    cos_sin: int,
    max_positions: int,
    positions: int,
    write_index: int,
    keys: int,
    key_stride: int,
    values: int,
    value_stride: int,
    kv: int,
    num_pages: int,
    page_size: int,
    /,
) -> None: ...
def pack_weight(kind: int, weight: int, out: int, n: int, k: int, /) -> None: ...
def linear(
    context: Context,
    dtype: int,
    x: int,
    x_stride: int,
    kind: int,
    weight: int,
    bias: int,
    out: int,
    m: int,
    n: int,
    k: int,
    wide: bool,
    /,
) -> None: ...

class CodedLayout:
    """How a coded weight is packed; see csrc/coded.h. `order` is an address or 0."""

    def __init__(
        self, codes: int, k: int, group: int, narrow: bool, shifted: bool, order: int, /
    ) -> None: ...
    def packed_bytes(self, n: int, /) -> int: ...

def pack_coded(
    layout: CodedLayout, codes: int, scales: int, shifts: int, n: int, out: int, /
) -> None: ...

_Routing = tuple[int, int, int, int, int, bool, float, float, float]

def route(
    routing: _Routing,
    logits: int,
    bias: int,
    tokens: int,
    experts: int,
    weights: int,
    ids: int,
    /,
) -> None: ...
def gate_rows(dtype: int, x: int, gate: int, rows: int, width: int, /) -> None: ...

class ExpertLayers:
    """Addresses of the weights of a mixture's experts; see csrc/experts.h."""

    def __init__(
        self,
        gate_up: list[LinearWeight],
        down: list[LinearWeight],
        activation: int,
        limit: float,
        /,
    ) -> None: ...

class LowRankLayer:
    """Addresses of adapters' additions to a linear layer, by slot; see csrc/low_rank.h."""

    def __init__(self, in_size: int, out_size: int, /) -> None: ...
    def place(
        self, slot: int, a: int, ranks: int, parts: list[tuple[int, int, int, int, int]], /
    ) -> None: ...
    def add(
        self,
        context: Context,
        dtype: int,
        x: int,
        x_stride: int,
        num_rows: int,
        out: int,
        out_stride: int,
        wide: bool,
        adapters: _Adapters,
        /,
    ) -> None: ...

class Mixture:
    """Buffers of mixtures."""

    def run(
        self,
        layers: ExpertLayers,
        context: Context,
        dtype: int,
        x: int,
        tokens: int,
        k: int,
        ids: int,
        weights: int,
        out: int,
        /,
    ) -> None: ...

class LinearWeight:
    """A packed weight of any kind, or the first of a chain; see csrc/ops.h."""

    n: int
    k: int
    out_stride: int
    @overload
    def __init__(
        self,
        layout: CodedLayout,
        data: int,
        scales: int,
        bias: int,
        n: int,
        out_stride: int,
        following: LinearWeight | None,
    ) -> None: ...
    @overload
    def __init__(
        self,
        kind: int,
        data: int,
        scales: int,
        bias: int,
        n: int,
        k: int,
        out_stride: int,
        following: LinearWeight | None,
        fine: bool = False,
    ) -> None: ...

def packed_bytes(kind: int, n: int, k: int, /) -> int: ...
def pack_int8(numbers: int, out: int, n: int, k: int, /) -> None: ...
def pack_blocks(
    kind: int,
    numbers: int,
    d: int,
    scales: int,
    least: int,
    minima: int,
    out: int,
    n: int,
    k: int,
    /,
) -> None: ...
def quantize(
    context: Context,
    kind: int,
    dtype: int,
    weights: int,
    out: int,
    scales: int,
    n: int,
    k: int,
    /,
) -> None: ...
def linear_any(
    context: Context,
    weight: LinearWeight,
    dtype: int,
    x: int,
    x_stride: int,
    rows: int,
    out: int,
    /,
) -> None: ...
def linear_fp32(
    context: Context,
    weight: LinearWeight,
    dtype: int,
    x: int,
    x_stride: int,
    rows: int,
    out: int,
    /,
) -> None: ...
