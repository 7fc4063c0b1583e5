"""The options of `sapwood bench ops`. No torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.kernels.latent import LatentSizes
from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class DeltaHeads:
    """Of gated delta rules: heads of keys, which those of values share, all equally long."""

    num_key_heads: int
    num_value_heads: int
    head_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ScanHeads:
    """Of Mamba 2's layers: heads of `head_dim` channels, each with `state_size` numbers of state
    per channel. All heads have the same keys and queries."""

    num_heads: int
    head_dim: int
    state_size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Sizes of a model. `inner` is of each expert where there are any, of which a token has
    `num_chosen`. Attention is that over `latent` rows where a model has such sizes. Where it has
    `delta`, three of four layers keep a state instead, and where it has `scan`, seven of eight."""

    hidden: int
    inner: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab: int
    num_experts: int = 0
    num_chosen: int = 0
    latent: LatentSizes | None = None
    delta: DeltaHeads | None = None
    scan: ScanHeads | None = None


SHAPES = {
    "smollm2-135m": Shape(
        hidden=576, inner=1536, num_heads=9, num_kv_heads=3, head_dim=64, vocab=49152
    ),
    "qwen3-0.6b": Shape(
        hidden=1024, inner=3072, num_heads=16, num_kv_heads=8, head_dim=128, vocab=151936
    ),
    "granite-3.1-1b-a400m": Shape(
        hidden=1024,
        inner=512,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab=49155,
        num_experts=32,
        num_chosen=8,
    ),
    "qwen3moe-1b": Shape(
        hidden=1024,
        inner=256,
        num_heads=16,
        num_kv_heads=8,
        head_dim=64,
        vocab=49152,
        num_experts=64,
        num_chosen=8,
    ),
    "olmoe-1b-7b": Shape(
        hidden=2048,
        inner=1024,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        vocab=50304,
        num_experts=64,
        num_chosen=8,
    ),
    "deepseek3-1b": Shape(
        hidden=1024,
        inner=256,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        vocab=49152,
        num_experts=64,
        num_chosen=8,
        latent=LatentSizes(
            num_heads=16, rank=512, rope_dim=64, nope_dim=128, value_dim=128, query_rank=512
        ),
    ),
    "qwen3next-1b": Shape(
        hidden=1024,
        inner=256,
        num_heads=16,
        num_kv_heads=2,
        head_dim=64,
        vocab=49152,
        num_experts=64,
        num_chosen=8,
        delta=DeltaHeads(num_key_heads=8, num_value_heads=16, head_dim=128),
    ),
    "granite4h-0.1b": Shape(
        hidden=768,
        inner=2048,
        num_heads=12,
        num_kv_heads=4,
        head_dim=64,
        vocab=49152,
        scan=ScanHeads(num_heads=48, head_dim=32, state_size=128),
    ),
    "deepseek-v2-lite": Shape(
        hidden=2048,
        inner=1408,
        num_heads=16,
        num_kv_heads=16,
        head_dim=192,
        vocab=102400,
        num_experts=64,
        num_chosen=6,
        latent=LatentSizes(num_heads=16, rank=512, rope_dim=64, nope_dim=128, value_dim=128),
    ),
    "llama-3-8b": Shape(
        hidden=4096, inner=14336, num_heads=32, num_kv_heads=8, head_dim=128, vocab=128256
    ),
}

DENSE, MIXTURE = "smollm2-135m", "qwen3moe-1b"
"""The shapes that are measured if none is named."""
EXPERTS = "experts"
"""The ops that only models with experts have begin so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsOptions:
    """What is measured."""

    shape: str = option(
        "",
        f"Sizes of this model; empty: {DENSE}, or for --ops experts {MIXTURE}.",
        choices=("", *SHAPES),
    )
    dtype: str = option("bfloat16", "Of weights and activations.", choices=("bfloat16", "float32"))
    rows: str = option("1,4,32,256,1024", "Numbers of new tokens at once, with commas.")
    context: int = option(512, "Tokens that each decode attends to.", unit="tokens")
    ops: str = option("", "Only ops whose name begins so, with commas; empty: all.")
    num_threads: int = option(0, "Threads of each op; 0: the usable cores.", unit="threads")
    seconds: float = option(0.2, "Time spent on each op of each implementation.", unit="seconds")

    @property
    def shape_name(self) -> str:
        wants_experts = any(prefix.startswith(EXPERTS) for prefix in self.prefixes)
        return self.shape or (MIXTURE if wants_experts else DENSE)

    @property
    def sizes(self) -> list[int]:
        return [int(part) for part in self.rows.split(",")]

    @property
    def prefixes(self) -> tuple[str, ...]:
        return tuple(part.strip() for part in self.ops.split(",") if part.strip())

    def __post_init__(self) -> None:
        if not all(part.strip().isdigit() and int(part) > 0 for part in self.rows.split(",")):
            raise ConfigError(f"--rows is {self.rows!r} but must look like 1,32,1024")
        if self.context < 1 or self.seconds <= 0 or self.num_threads < 0:
            raise ConfigError("--context must be >= 1, --seconds > 0 and --num-threads >= 0")
