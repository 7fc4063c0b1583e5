"""How many ranks hold one model, and how many replicas of it serve."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

MAX_REPLICAS = 64
"""More than one machine has room for."""
_OLD_NAMES = {"shortest_queue": "total_requests", "minimum_tokens": "total_tokens"}
BALANCE_METHODS = (
    *("auto", "round_robin", "total_requests", "total_tokens", "prefix_aware"),
    *_OLD_NAMES,
)


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
        1,
        "Replicas of the model, each an engine of its own, behind one server. On a CPU they share "
        "the cores and the memory; limits of requests and tokens hold for each replica.",
        aliases=("dp", "data-parallel-size"),
        unit="replicas",
    )
    load_balance_method: str = option(
        "auto",
        "Which replica gets a request: round_robin, one after another; total_requests, the one "
        "with the fewest open requests (older name: shortest_queue); total_tokens, the one whose "
        "open requests have the fewest tokens (older name: minimum_tokens); prefix_aware, the one "
        "that has the least to compute then, since a prompt's known beginning costs nothing. "
        "auto: prefix_aware.",
        choices=BALANCE_METHODS,
    )

    def __post_init__(self) -> None:
        if self.load_balance_method == "follow_bootstrap_room":
            raise ConfigError(
                "--load-balance-method follow_bootstrap_room is for servers that compute only "
                f"prompts; choose one of {', '.join(BALANCE_METHODS)}"
            )
        check_options(self)
        for name in ("tp_size", "pp_size"):
            value = getattr(self, name)
            if value != 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {value} but this version serves with 1; "
                    "run one server per replica"
                )
        if not 1 <= self.dp_size <= MAX_REPLICAS:
            raise ConfigError(
                f"--dp-size is {self.dp_size} but must be from 1 to {MAX_REPLICAS}; more replicas "
                "take several servers and `sapwood gateway`"
            )
        if self.load_balance_method != "auto" and self.dp_size == 1:
            raise ConfigError(
                "--load-balance-method chooses among replicas, but there is one; set --dp-size, or "
                "leave it out"
            )

    @property
    def balance(self) -> str:
        """The method by its present name."""
        method = self.load_balance_method
        return "prefix_aware" if method == "auto" else _OLD_NAMES.get(method, method)
