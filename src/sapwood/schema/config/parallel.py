"""Over how many ranks one model is spread, on how many machines, and how many replicas serve."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.stage import Stage, stages_of

MAX_REPLICAS = 64
"""More than one machine has room for."""
_OLD_NAMES = {"shortest_queue": "total_requests", "minimum_tokens": "total_tokens"}
BALANCE_METHODS = (
    *("auto", "round_robin", "total_requests", "total_tokens", "prefix_aware"),
    *_OLD_NAMES,
)
A2A_BACKENDS = NO_A2A, TORCH_A2A, DEEPEP = ("none", "torch", "deepep")
DEEPEP_MODES = ("auto", "normal")
PLACEMENTS = LOCAL, RAY = ("local", "ray")
_LIBRARIES = ("mooncake", "nixl", "mori", "ascend_fuseep", "flashinfer")
"""Which SGLang sends tokens with, besides."""


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
        "Stages that the layers are shared out to, each of --tp-size ranks (pipeline parallelism).",
        aliases=("pp", "pipeline-parallel-size"),
        unit="stages",
    )
    pp_layer_partition: str | None = option(
        None,
        "Layers of each stage, for example 10,12; by default as even as possible.",
    )
    pp_max_micro_batch_size: int | None = option(
        None,
        "Requests of one step that decode, at most, so that the stages compute several steps at "
        "once; by default an even share of --max-running-requests.",
        unit="requests",
    )
    dp_size: int = option(
        1,
        "Replicas of the model, each an engine of its own, behind one server. On a CPU they share "
        "the cores and the memory; limits of requests and tokens hold for each replica.",
        aliases=("dp", "data-parallel-size"),
        unit="replicas",
    )
    enable_dp_attention: bool = option(
        False,
        "The --dp-size replicas share one copy of the feed-forward layers (tensor or expert "
        "parallelism), and each computes the attention of its own requests. --tp-size must be the "
        "same number as --dp-size.",
    )
    enable_dp_lm_head: bool = option(
        False,
        "With --enable-dp-attention: each replica has the whole output layer, instead of a part of "
        "the vocabulary.",
    )
    ep_size: int = option(
        1,
        "Parts into which a model's experts are divided among the ranks of --tp-size (expert "
        "parallelism), a divisor of it: each rank has whole experts if both are equal.",
        aliases=("ep", "expert-parallel-size"),
        unit="parts",
    )
    moe_a2a_backend: str = option(
        "none",
        "With --enable-dp-attention, how a token gets to the ranks that have its experts: torch, "
        "each rank sends tokens only to the ranks whose experts they chose (all-to-all: in shared "
        "memory, over gloo or NCCL); deepep, likewise, with the library DeepEP between GPUs that "
        "NVLink joins; none, all ranks gather all tokens, and add up.",
        choices=A2A_BACKENDS,
    )
    deepep_mode: str = option(
        "auto",
        "How DeepEP sends tokens: normal, each rank waits until it knows how many come. auto: "
        "normal.",
        choices=DEEPEP_MODES,
    )
    ep_num_redundant_experts: int = option(
        0,
        "Further copies of experts in each layer of experts, over all ranks: so an expert that "
        "many tokens choose can be on several ranks.",
        unit="experts",
    )
    init_expert_location: str = option(
        "trivial",
        "Where experts are at the start: trivial, on the ranks in turn; or the path of a .json or "
        ".pt file, or JSON itself, with physical_to_logical_map (the expert of each slot of each "
        "layer, over all ranks) or logical_count (how often each expert of each layer was chosen, "
        "as /dump_expert_distribution_record writes).",
    )
    enable_eplb: bool = option(
        False,
        "Move experts between ranks while serving, so that all ranks have about as much to "
        "compute (expert parallelism load balancing).",
    )
    eplb_rebalance_num_iterations: int = option(
        1000,
        "Steps over which the load of experts is counted before they are moved.",
        unit="steps",
    )
    eplb_rebalance_layers_per_chunk: int | None = option(
        None,
        "Layers whose experts are moved between two steps; the others wait for the next steps. "
        "Default: all layers at once.",
        unit="layers",
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
    placement: str = option(
        "local",
        "Where the processes of `sapwood serve` are: local, on this machine, and with --nnodes "
        "where the same command runs; ray, in placement groups of a Ray cluster, one for each "
        "replica.",
        choices=PLACEMENTS,
    )
    nnodes: int = option(
        1,
        "Machines that share the ranks; the same command runs on each, with its own --node-rank, "
        "unless Ray starts them (--placement ray).",
        unit="machines",
    )
    node_rank: int = option(
        0, "Which of the machines this is; the first one, 0, has the scheduler and the HTTP server."
    )
    dist_init_addr: str | None = option(
        None,
        "host:port on which the first machine waits for the ranks of the others; needed with "
        "--nnodes above 1. The network between them must be trusted.",
        aliases=("nccl-init-addr",),
    )
    dist_timeout: float = option(
        300.0,
        "How long the ranks wait for each other at the start, and in one exchange of a step.",
        unit="seconds",
    )

    def __post_init__(self) -> None:
        if self.load_balance_method == "follow_bootstrap_room":
            raise ConfigError(
                "--load-balance-method follow_bootstrap_room is for servers that compute only "
                f"prompts; choose one of {', '.join(BALANCE_METHODS)}"
            )
        if self.moe_a2a_backend in _LIBRARIES:
            raise ConfigError(
                f"--moe-a2a-backend {self.moe_a2a_backend} is no library that sapwood calls; "
                "use torch, which sends tokens over NCCL between GPUs, or deepep"
            )
        if self.deepep_mode == "low_latency":
            raise ConfigError(
                "--deepep-mode low_latency is not implemented: it has room for the same number of "
                "tokens for each expert, however few come; use normal"
            )
        check_options(self)
        for name in ("tp_size", "pp_size", "nnodes"):
            value = getattr(self, name)
            if value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be >= 1")
        sizes = self.layers_of_stages
        if sizes is not None and (len(sizes) != self.pp_size or min(sizes) < 1):
            raise ConfigError(
                f"--pp-layer-partition is {self.pp_layer_partition!r} but must have a number of "
                f"layers, at least 1, for each of the {self.pp_size} stages of --pp-size"
            )
        if self.pp_max_micro_batch_size is not None and (
            self.pp_size == 1 or self.pp_max_micro_batch_size < 1
        ):
            raise ConfigError(
                f"--pp-max-micro-batch-size is {self.pp_max_micro_batch_size} but must be >= 1, "
                "and goes together with --pp-size above 1"
            )
        self._check_experts()
        self._check_replicas()
        self._check_shared_feed_forward()
        self._check_nodes()

    def _check_experts(self) -> None:
        if self.ep_size < 1 or self.tp_size % self.ep_size:
            raise ConfigError(
                f"--ep-size is {self.ep_size} but must divide --tp-size, which is {self.tp_size}"
            )
        if self.ep_num_redundant_experts < 0:
            raise ConfigError(
                f"--ep-num-redundant-experts is {self.ep_num_redundant_experts} but must be >= 0"
            )
        moves = self.ep_num_redundant_experts or self.enable_eplb
        if self.ep_size == 1 and (moves or self.init_expert_location != "trivial"):
            raise ConfigError(
                "--ep-num-redundant-experts, --enable-eplb and --init-expert-location are for "
                "experts that are spread over ranks; set --tp-size and --ep-size, or leave them out"
            )
        if self.moe_a2a_backend != NO_A2A and not (
            self.enable_dp_attention and self.ep_size == self.tp_size
        ):
            raise ConfigError(
                f"--moe-a2a-backend {self.moe_a2a_backend} sends tokens between ranks that have "
                "requests and experts of their own; set --enable-dp-attention, and --ep-size to "
                f"--tp-size, which is {self.tp_size}, or leave it out"
            )
        if self.deepep_mode != "auto" and self.moe_a2a_backend != DEEPEP:
            raise ConfigError(
                f"--deepep-mode {self.deepep_mode} does nothing without --moe-a2a-backend deepep; "
                "give both or neither"
            )
        if self.eplb_rebalance_num_iterations < 1:
            raise ConfigError(
                f"--eplb-rebalance-num-iterations is {self.eplb_rebalance_num_iterations} but must "
                "be >= 1"
            )
        layers = self.eplb_rebalance_layers_per_chunk
        if layers is not None and layers < 1:
            raise ConfigError(f"--eplb-rebalance-layers-per-chunk is {layers} but must be >= 1")

    def _check_replicas(self) -> None:
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
        if self.dp_size > 1 and self.nnodes > 1 and self.placement == LOCAL:
            raise ConfigError(
                "--dp-size above 1 keeps all replicas on one machine, but --nnodes is "
                f"{self.nnodes}; run one server per replica, and `sapwood gateway` in front of them"
            )

    def _check_shared_feed_forward(self) -> None:
        if not self.enable_dp_attention:
            if self.enable_dp_lm_head:
                raise ConfigError(
                    "--enable-dp-lm-head does nothing without --enable-dp-attention; give both or "
                    "neither"
                )
            return
        if self.dp_size == 1 or self.tp_size != self.dp_size:
            raise ConfigError(
                f"--dp-size is {self.dp_size} and --tp-size {self.tp_size}, but with "
                "--enable-dp-attention each rank has the attention of its own requests: both must "
                "be the same number, above 1"
            )
        others = {"--pp-size": self.pp_size > 1, "--enable-eplb": self.enable_eplb}
        for name, is_given in others.items():
            if is_given:
                raise ConfigError(
                    f"--enable-dp-attention does not go together with {name}; leave out one of them"
                )

    def _check_nodes(self) -> None:
        if self.num_ranks % self.nnodes:
            raise ConfigError(
                f"--nnodes is {self.nnodes}, which {self.num_ranks} ranks cannot be shared out to "
                "evenly"
            )
        if not 0 <= self.node_rank < self.nnodes:
            raise ConfigError(
                f"--node-rank is {self.node_rank} but must be from 0 to {self.nnodes - 1}, one "
                "less than --nnodes"
            )
        if self.placement == RAY:
            given = {
                "--dist-init-addr": self.dist_init_addr is not None,
                "--node-rank": self.node_rank > 0,
                "--enable-dp-attention": self.enable_dp_attention,
            }
            for name, is_given in given.items():
                if is_given:
                    raise ConfigError(
                        f"--placement ray does not go together with {name}; leave out one of them"
                    )
        elif self.nnodes > 1 and self.dist_init_addr is None:
            raise ConfigError(
                "--nnodes above 1 needs --dist-init-addr: where the first machine can be reached"
            )
        if self.dist_init_addr is not None:
            split_address(self.dist_init_addr)
        if not self.dist_timeout > 0:
            raise ConfigError(f"--dist-timeout is {self.dist_timeout} but must be > 0")

    @property
    def balance(self) -> str:
        """The method by its present name."""
        method = self.load_balance_method
        return "prefix_aware" if method == "auto" else _OLD_NAMES.get(method, method)

    @property
    def attention_size(self) -> int:
        """Ranks that share the heads of attention, and so have the same requests."""
        return self.tp_size // self.dp_size if self.enable_dp_attention else self.tp_size

    @property
    def num_ranks(self) -> int:
        """Ranks of one replica, which has requests of its own."""
        return self.attention_size * self.pp_size

    @property
    def layers_of_stages(self) -> list[int] | None:
        """Layers of each stage; None: as even as possible. ConfigError if they are no numbers."""
        if self.pp_layer_partition is None:
            return None
        parts = self.pp_layer_partition.split(",")
        if not all(part.strip().isdecimal() and len(part) < 10 for part in parts):
            raise ConfigError(
                f"--pp-layer-partition is {self.pp_layer_partition!r} but must be numbers, for "
                "example 10,12"
            )
        return [int(part) for part in parts]

    def most_decodes(self, max_running_requests: int) -> int | None:
        """Of requests in one step; None: any number, since there is one stage."""
        if self.pp_size == 1:
            return None
        return self.pp_max_micro_batch_size or -(-max_running_requests // self.pp_size)

    def stage_index(self, rank: int) -> int:
        """The stage that the rank is in. Rank 0 has the scheduler, and is in the last stage, where
        tokens are chosen; the ranks after those of its stage are in the first one."""
        return (rank // self.tp_size + self.pp_size - 1) % self.pp_size

    def stage_of(self, rank: int, num_layers: int) -> Stage:
        """The rank's stage of a model; ConfigError if the model has too few layers, or others."""
        stages = stages_of(num_layers, self.pp_size, self.layers_of_stages)
        return stages[self.stage_index(rank)]

    @property
    def ranks_per_node(self) -> int:
        return self.num_ranks // self.nnodes

    @property
    def own_ranks(self) -> range:
        """The ranks on this machine."""
        first = self.node_rank * self.ranks_per_node
        return range(first, first + self.ranks_per_node)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of --dist-init-addr; ConfigError if the text is not host:port."""
    host, colon, port = address.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not port.isdecimal() or not 0 < int(port) < 65536:
        raise ConfigError(
            f"--dist-init-addr is {address!r} but must be host:port, for example 10.0.0.1:29500"
        )
    return host, int(port)
