"""How many ranks hold one model. This version serves one rank per engine."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    tp_size: int = option(
        1,
        "Ranks that share each layer (tensor parallelism).",
        aliases=("tp", "tensor-parallel-size"),
        unit="ranks",
    )
    pp_size: int = option(
        1,
        "Ranks that share the layers out (pipeline parallelism).",
        aliases=("pp", "pipeline-parallel-size"),
        unit="ranks",
    )
    dp_size: int = option(
        1, "Replicas of the model.", aliases=("dp", "data-parallel-size"), unit="replicas"
    )

    def __post_init__(self) -> None:
        check_options(self)
        for name in ("tp_size", "pp_size", "dp_size"):
            value = getattr(self, name)
            if value != 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value} but this version serves with 1; "
                    "run one server per replica"
                )
