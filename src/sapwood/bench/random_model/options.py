"""The options of `sapwood bench random-model`. No torch, so that --help is quick."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.bench.ops.options import MIXTURE, SHAPES
from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class RandomModelOptions:
    """The model that is written."""

    checkpoint: str = option("random-model", "Directory for the checkpoint; it must not exist.")
    gguf: str | None = option(None, "File for the same weights as GGUF; None: none is written.")
    shape: str = option(MIXTURE, "Sizes of each layer.", choices=tuple(SHAPES))
    num_layers: int = option(8, "Decoder layers.", unit="layers")
    tokenizer: str = option("smollm2-135m", "Model whose tokenizer is copied.")
    dtype: str = option("bfloat16", "Of the weights.", choices=tuple(DTYPE_BYTES))
    seed: int = option(0, "Seed of the weights.")
    offline: bool = option(False, "Use only what is cached; never ask a source for the tokenizer.")

    def __post_init__(self) -> None:
        if self.num_layers < 1:
            raise ConfigError(f"--num-layers is {self.num_layers} but must be >= 1")
