"""Where and how a step is computed."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.base.numa import nodes_of
from sapwood.schema.config.options import check_options, option

STAT, STAT_APPROX, PER_PASS, PER_TOKEN = RECORDER_MODES = (
    *("stat", "stat_approx", "per_pass", "per_token"),
)

CPU_PRODUCTS = ("exact", "fast")
DEFAULT_CPU_PRODUCTS = "exact"


@dataclass(frozen=True, slots=True, kw_only=True)
class ExecutionConfig:
    """Where and how a step is computed, as asked."""

    device: str | None = option(
        None, "Device of the model: cpu, cuda, cuda:0 …; auto, the default: the best."
    )
    base_gpu_id: int = option(
        0,
        "Number of the first CUDA device, for --device auto and cuda; those of further ranks "
        "follow.",
    )
    numa_node: str | None = option(
        None,
        "Nodes of a NUMA machine on whose cores and memory the engine stays: one for it, or one "
        "for each rank or replica; default: all that the process may use.",
        many=True,
    )
    num_threads: int | None = option(
        None, "Threads that compute a step on a CPU; default: the usable cores.", unit="threads"
    )
    cpu_products: str | None = option(
        None,
        "What a product on a CPU may depend on. fast: kernels that round otherwise serve where a "
        "step has many rows. exact: a row's result depends on that row and the weights alone, "
        "whatever is cached or runs beside it; prompts take longer with weights in 4 to 8 bits "
        f"(docs/determinism.md). Default: {DEFAULT_CPU_PRODUCTS} where the compiled kernels serve; "
        "others (torch, reference, layers of the transformers library) have fast ones only.",
        choices=CPU_PRODUCTS,
    )
    enable_deterministic_inference: bool = option(
        False,
        "An answer depends on its request alone, bit by bit: not on what is cached, who else is "
        "served, or how prompts are cut. On CPUs that takes exact products, hence no "
        "--cpu-products fast; on GPUs products and attention take fixed tiles and chunks, and what "
        "cannot is refused (docs/determinism.md).",
    )
    kernels: str | None = option(
        None,
        "Use only this implementation of the ops (triton, cpu, torch, reference), or the compiled "
        "ones with an instruction set that this machine has, such as cpu:avx2; default: the "
        "fastest that can.",
    )
    disable_graphs: bool = option(
        False,
        "Call a step's ops one by one, also where the kernels can run it in one call.",
        aliases=("disable-cuda-graph",),
    )
    cuda_graph_max_bs: int | None = option(
        None,
        "Running requests up to which a GPU captures steps that decode; default: 512, or "
        "--max-running-requests if that is less.",
        unit="requests",
    )
    cuda_graph_bs: str | None = option(
        None,
        "Numbers of requests for which a GPU captures steps that decode, with commas; default: "
        "four in each doubling up to --cuda-graph-max-bs.",
    )
    piecewise_cuda_graph_tokens: str | None = option(
        None,
        "Numbers of tokens for which a GPU captures other steps, piece by piece between their "
        "attention, with commas; default: two in each doubling from 64 up to 4096.",
    )
    disable_piecewise_cuda_graph: bool = option(
        False, "Capture only steps that decode. For comparison."
    )
    enable_custom_logit_processor: bool = option(
        False,
        "Run code that requests bring as their custom_logit_processor. It can do whatever this "
        "process can: only for clients that are trusted with the machine.",
    )
    enable_return_hidden_states: bool = option(
        False,
        "Let requests ask for hidden states with return_hidden_states. An answer then has a vector "
        "for each of its tokens, in JSON some 12 bytes per number.",
    )
    enable_return_routed_experts: bool = option(
        False,
        "Let requests ask which experts computed each token with return_routed_experts. An answer "
        "then has 4 bytes in base64 per token, layer and expert.",
    )
    expert_distribution_recorder_mode: str | None = option(
        None,
        "Lets /start_expert_distribution_record record which experts are chosen: stat, how often "
        "each one is in each layer and step; stat_approx, the same here; per_pass, with each "
        "step's size; per_token, the experts of each token. Steps take longer meanwhile.",
        choices=RECORDER_MODES,
    )
    expert_distribution_recorder_buffer_size: int = option(
        1000, "Steps that the record keeps, the last ones; -1: all.", unit="steps"
    )
    expert_distribution_recorder_dir: str | None = option(
        None,
        "Folder of the files of /dump_expert_distribution_record; default: sapwood-experts in the "
        "system's folder for temporary files.",
    )
    skip_server_warmup: bool = option(False, "Answer the first request without a warm-up step.")

    def __post_init__(self) -> None:
        check_options(self)
        if self.numa_node is not None:
            nodes_of(self.numa_node)
        if self.base_gpu_id < 0:
            raise ConfigError(f"--base-gpu-id is {self.base_gpu_id} but must be >= 0")
        if self.expert_distribution_recorder_buffer_size < 1 and (
            self.expert_distribution_recorder_buffer_size != -1
        ):
            raise ConfigError(
                "--expert-distribution-recorder-buffer-size is "
                f"{self.expert_distribution_recorder_buffer_size} but must be >= 1, or -1 for all "
                "steps"
            )
        if self.num_threads is not None and self.num_threads < 1:
            raise ConfigError(f"--num-threads is {self.num_threads} but must be >= 1")
        if self.cuda_graph_max_bs is not None and self.cuda_graph_max_bs < 1:
            raise ConfigError(f"--cuda-graph-max-bs is {self.cuda_graph_max_bs} but must be >= 1")
        if self.cuda_graph_max_bs is not None and self.cuda_graph_bs is not None:
            raise ConfigError("--cuda-graph-bs names all sizes; leave --cuda-graph-max-bs out")
        if self.disable_piecewise_cuda_graph and self.piecewise_cuda_graph_tokens is not None:
            raise ConfigError(
                "--piecewise-cuda-graph-tokens does nothing with --disable-piecewise-cuda-graph; "
                "give one of them"
            )
        if self.disable_graphs and self.capture_options:
            raise ConfigError(
                f"{', '.join(self.capture_options)} does nothing with --disable-graphs; leave one "
                "of them out"
            )

    @property
    def options_of_experts(self) -> list[str]:
        """Those of the given flags by which experts are told."""
        given = {
            "--enable-return-routed-experts": self.enable_return_routed_experts,
            "--expert-distribution-recorder-mode": (
                self.expert_distribution_recorder_mode is not None
            ),
        }
        return [flag for flag, is_given in given.items() if is_given]

    @property
    def capture_options(self) -> list[str]:
        """Those of the given flags that say what a GPU captures."""
        given = {
            "--cuda-graph-max-bs": self.cuda_graph_max_bs is not None,
            "--cuda-graph-bs": self.cuda_graph_bs is not None,
            "--piecewise-cuda-graph-tokens": self.piecewise_cuda_graph_tokens is not None,
            "--disable-piecewise-cuda-graph": self.disable_piecewise_cuda_graph,
        }
        return [flag for flag, is_given in given.items() if is_given]


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedExecution(ExecutionConfig):
    """After resolution: where a step is computed is known."""

    device: str
    num_threads: int
