"""From what was asked to what will run, with the reason of every choice.

These functions are pure: they are given facts about machine and model, and read nothing else.
"""

from __future__ import annotations

from dataclasses import replace

from sapwood.base.dtypes import DTYPE_BYTES, KV_CACHE_8_BIT
from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheKind, CachePlan, Demand, within
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.config.execution import (
    DEFAULT_CPU_PRODUCTS,
    ExecutionConfig,
    ResolvedExecution,
)
from sapwood.schema.config.facts import CheckpointFacts, MachineFacts, ModelFacts
from sapwood.schema.config.features import (
    check_adapters,
    check_disaggregation,
    check_shared_feed_forward,
    check_speculation,
    check_tiers,
)
from sapwood.schema.config.guessing import explain_speculation, resolve_trees
from sapwood.schema.config.memory import MemoryConfig, ResolvedMemory
from sapwood.schema.config.model import (
    CHECKPOINT_FORMATS,
    GGUF_BLOCKS,
    ON_THE_FLY,
    ModelConfig,
    ResolvedModel,
)
from sapwood.schema.config.options import decided
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.scheduler import ResolvedScheduler, SchedulerConfig
from sapwood.schema.config.state_options import refuse_idle_state_options, state_interval
from sapwood.schema.config.window_share import check_window_share

QUANTIZED_BYTES = {
    "w8a8_int8": 1.0, "w4a8": 0.625, "w8a16": 1.0, "fp8": 1.0, "gguf": 0.625, "gguf_a8": 0.625
}  # fmt: skip
"""Bytes per weight, for estimates. The blocks of a GGUF file have from 0.33 to 1.06."""
LEAST_BITS_OF_HALVES = 12
"""A file with fewer bits per weight is quantised, not in 16 bits."""
DEFAULT_PAGE_SIZE = 16
DEFAULT_POOL_FRACTION = 0.25
"""Share of the free memory that the KV pool takes on a CPU, where other programs live too."""
POOL_CONTEXTS = 32
"""The default pool holds at most this many requests of the full context length."""
MAX_PAGES = 2**31 - 1


def resolve(
    asked: EngineConfig, machine: MachineFacts, model: ModelFacts
) -> tuple[ResolvedConfig, list[Decision]]:
    """Make every choice that was left open, each with its reason.

    Raises ConfigError if an option contradicts the machine or the model.
    """
    decisions: list[Decision] = []
    machine = _share_of(machine, asked.parallel, decisions)
    check_speculation(asked, model)
    check_adapters(asked, model)
    check_shared_feed_forward(asked, model)
    check_tiers(asked, model)
    check_disaggregation(asked, model)
    execution = _resolve_execution(asked, machine, decisions)
    model_config = resolve_model(asked.model, execution, machine, model, decisions)
    scheduler = _resolve_scheduler(asked.scheduler, asked.parallel, execution, decisions)
    speculation, drafting = resolve_trees(asked, model, decisions)
    explain_speculation(scheduler, speculation, drafting, model, decisions)
    demand = demand_of(scheduler, model_config)
    memory = _resolve_memory(
        asked.memory, model_config, execution, machine, model, demand, decisions
    )
    if model.whole_prompts:
        memory, scheduler = _for_whole_prompts(asked, model_config, memory, scheduler, decisions)
    config = decided(
        ResolvedConfig,
        asked,
        model=model_config,
        memory=memory,
        scheduler=scheduler,
        execution=execution,
        speculation=speculation,
        drafting=drafting,
    )
    return config, decisions


def _share_of(
    machine: MachineFacts, parallel: ParallelConfig, decisions: list[Decision]
) -> MachineFacts:
    """What one of several replicas may use; a GPU is never shared."""
    count = parallel.dp_size
    if count == 1:
        return machine
    if parallel.load_balance_method == "auto":
        why = "it computes the least: prompts go where their beginning is cached"
        decisions.append(Decision("load_balance_method", parallel.balance, why))
    on_cpu = machine.device == "cpu"
    return replace(
        machine,
        num_cores=max(1, machine.num_cores // count),
        memory_bytes=machine.memory_bytes // count if on_cpu else machine.memory_bytes,
        available_bytes=machine.available_bytes // count if on_cpu else machine.available_bytes,
    )


def _resolve_execution(
    config: EngineConfig, machine: MachineFacts, decisions: list[Decision]
) -> ResolvedExecution:
    asked = config.execution
    device = asked.device
    if device is None or device == "auto":
        device = machine.device
        decisions.append(Decision("device", device, "the best device found"))
    if asked.capture_options and device == "cpu":
        raise ConfigError(
            f"{', '.join(asked.capture_options)} does nothing on a CPU, whose kernels record steps "
            "of all sizes; leave it out"
        )
    cpu_products = _choose_products(asked, device, decisions)
    num_threads = asked.num_threads
    if num_threads is None:
        num_threads = machine.num_cores
        parallel = config.parallel
        num_sharing = parallel.ranks_per_node * parallel.dp_size
        shared = f", shared by {num_sharing} ranks or replicas" if num_sharing > 1 else ""
        decisions.append(Decision("num_threads", num_threads, f"the usable cores{shared}"))
    return decided(
        ResolvedExecution,
        asked,
        device=device,
        num_threads=num_threads,
        cpu_products=cpu_products,
    )


def _choose_products(asked: ExecutionConfig, device: str, decisions: list[Decision]) -> str | None:
    """What products on a CPU depend on; None elsewhere. ConfigError for what cannot be."""
    products = asked.cpu_products
    if device != "cpu":
        if products is not None:
            raise ConfigError(f"--cpu-products {products} does nothing on {device}; leave it out")
        return None
    if asked.enable_deterministic_inference:
        if products == "fast":
            raise ConfigError(
                "--cpu-products fast lets a row depend on how many there are, which "
                "--enable-deterministic-inference rules out; leave one of them out"
            )
        decisions.append(
            Decision("cpu_products", "exact", "--enable-deterministic-inference wants it")
        )
        return "exact"
    if products is not None:
        return products
    why = "an answer depends on its request alone"
    decisions.append(Decision("cpu_products", DEFAULT_CPU_PRODUCTS, why))
    return DEFAULT_CPU_PRODUCTS


def resolve_model(
    asked: ModelConfig,
    execution: ResolvedExecution,
    machine: MachineFacts,
    model: ModelFacts,
    decisions: list[Decision],
) -> ResolvedModel:
    """Which numbers a model computes with, its context and its name; ConfigError if that cannot
    be."""
    dtype = asked.dtype
    if dtype == "auto":
        dtype, reason = _choose_dtype(model, execution, machine)
        decisions.append(Decision("dtype", dtype, reason))
    quantization, why = _choose_quantization(asked, dtype, execution, model)
    if why is not None:
        decisions.append(Decision("quantization", quantization, why))
    weight_dtype, why = _choose_weight_dtype(asked, dtype, execution, model)
    if why is not None and quantization is None:
        decisions.append(Decision("weight_dtype", weight_dtype, why))
    length = asked.context_length
    if length is None:
        length = model.context_length
        decisions.append(Decision("context_length", length, "the model's own"))
    if not 1 < length <= model.max_context_length:
        raise ConfigError(
            f"--context-length is {length} but must be from 2 to {model.max_context_length}, "
            f"the positions that {model.name} was made for"
        )
    served = asked.served_model_name
    if not served:
        served = asked.model
        decisions.append(Decision("served_model_name", served, "the model's own"))
    return decided(
        ResolvedModel,
        asked,
        dtype=dtype,
        weight_dtype=weight_dtype,
        quantization=quantization,
        context_length=length,
        served_model_name=served,
    )


def _for_whole_prompts(
    asked: EngineConfig,
    model_config: ResolvedModel,
    memory: ResolvedMemory,
    scheduler: ResolvedScheduler,
    decisions: list[Decision],
) -> tuple[ResolvedMemory, ResolvedScheduler]:
    """The options of an encoder, which computes no text in chunks nor from a cached prefix."""
    length, chunk = model_config.context_length, scheduler.chunked_prefill_size
    if asked.scheduler.chunked_prefill_size not in (None, -1) and chunk < length:
        raise ConfigError(
            f"--chunked-prefill-size is {chunk}, but this model computes a text in one step, of up "
            f"to {length} tokens; leave the option out, or lower --context-length"
        )
    if -1 < chunk < length:
        chunk = length
        decisions.append(
            Decision("chunked_prefill_size", chunk, "the model computes a text in one step")
        )
    decisions.append(
        Decision("disable_radix_cache", True, "the model keeps nothing that could be shared")
    )
    return (
        replace(memory, disable_radix_cache=True),
        replace(scheduler, chunked_prefill_size=chunk),
    )


def _choose_dtype(
    model: ModelFacts, execution: ResolvedExecution, machine: MachineFacts
) -> tuple[str, str]:
    checkpoint = model.dtype
    if model.whole_prompts and checkpoint == "float32":
        return checkpoint, "the checkpoint's own: vectors are compared with those of other programs"
    on_cpu = execution.device == "cpu"
    if on_cpu and not machine.fast_bfloat16:
        return "float32", "this CPU has no instructions for bfloat16"
    if on_cpu and checkpoint != "bfloat16":
        return "bfloat16", f"half the bytes of float32; the checkpoint is {checkpoint}"
    if checkpoint == "float32":
        return "bfloat16", "half the bytes of the checkpoint's float32"
    return checkpoint, "the checkpoint's own"


def _choose_weight_dtype(
    asked: ModelConfig, dtype: str, execution: ResolvedExecution, model: ModelFacts
) -> tuple[str, str | None]:
    """What weights that are not quantised are kept in, and why if it was a choice; ConfigError if
    it cannot be."""
    widens = execution.device == "cpu" and dtype == "float32" and not model.whole_prompts
    widens = widens and asked.model_impl != "transformers"
    if asked.weight_dtype is not None:
        if asked.weight_dtype != dtype and not widens:
            raise ConfigError(
                f"--weight-dtype {asked.weight_dtype} needs --dtype {asked.weight_dtype} here: "
                "weights of another type are multiplied on a CPU only, with float32 activations, "
                "and neither by encoders nor by transformers"
            )
        return asked.weight_dtype, None
    if not widens:
        return dtype, None
    # A GGUF file's bfloat16 stands for its quantised types (store/gguf_config.py).
    is_narrow = model.dtype == "bfloat16" and model.weight_format != "gguf"
    if is_narrow or model.dtype == "float16":
        return (
            model.dtype,
            "the checkpoint's own: exactly its numbers, in half the bytes of float32",
        )
    if asked.dtype == "auto":
        return "float16", "half the bytes of float32; rounds weights to 11 bits, bfloat16 to 8"
    return "float32", "as the activations, which were asked for"


def _choose_quantization(
    asked: ModelConfig, dtype: str, execution: ResolvedExecution, model: ModelFacts
) -> tuple[str | None, str | None]:
    """How weights are quantised (None: not at all), and why; ConfigError if that cannot be."""
    if asked.quantization == "none" and model.quantized is None:
        return None, None
    bits = 8 * model.file_bytes / model.num_parameters
    if (
        asked.quantization is None
        and asked.weight_dtype is None
        and model.weight_format == "gguf"
        and 0 < bits < LEAST_BITS_OF_HALVES
        and execution.device == "cpu"
        and dtype != "float16"
        and not model.whole_prompts
    ):
        wide = 8 * DTYPE_BYTES[dtype]
        return "gguf", (
            f"the GGUF file's own blocks: {bits:.1f} bits per weight are read instead of {wide}; "
            "--quantization none expands them"
        )
    name = asked.quantization if model.quantized is None else model.quantized.name
    if name is None:
        return None, None
    return name, _check_quantization(name, asked.quantization, dtype, model)


def _check_quantization(name: str, asked: str | None, dtype: str, model: ModelFacts) -> str:
    """What the quantisation does to this model, in words; ConfigError if it is impossible here.

    asked  the name, if the options have it and not only the checkpoint
    """
    if dtype == "float16":
        raise ConfigError(
            f"--quantization {name} computes with bfloat16 or float32 activations, not "
            "with float16; use --dtype bfloat16"
        )
    if model.quantized is not None:
        return _check_checkpoint(asked, model, model.quantized)
    if name in GGUF_BLOCKS and model.weight_format != "gguf":
        raise ConfigError(
            f"--quantization {name} uses the blocks of a GGUF file, but the weights of "
            f"{model.name} are {model.weight_format or 'of another format'}; use --quantization "
            "w4a8 or w8a8_int8, which quantise while loading"
        )
    if name in CHECKPOINT_FORMATS and name not in ON_THE_FLY:
        raise ConfigError(
            f"--quantization {name} is for checkpoints that are stored so, but {model.name} is "
            f"not: its config.json has no quantization_config; use one of {', '.join(ON_THE_FLY)}, "
            "which quantise while loading"
        )
    reason = {
        "w8a8_int8": "asked for; int8 weights and activations, the output layer in Q8_0 blocks",
        "w4a8": "asked for; 4-bit weights, the output layer in Q8_0 blocks, int8 activations",
        "w8a16": "asked for; int8 weights, activations as they are",
        "fp8": "asked for; FP8 E4M3 weights, the output layer in int8, activations as they are",
        "gguf": "asked for; the file's own blocks, activations in 16 bits",
        "gguf_a8": "asked for; the file's own blocks, int8 activations",
    }[name]
    if name not in GGUF_BLOCKS and model.weight_format == "gguf":
        return f"{reason}; the GGUF file's own blocks are dequantised first"
    return reason


def _check_checkpoint(asked: str | None, model: ModelFacts, found: CheckpointFacts) -> str:
    if asked not in (None, found.name):
        raise ConfigError(
            f"--quantization {asked} was asked for, but the checkpoint of {model.name} is "
            f"quantised already ({found.summary}); leave the option out, or use the model's "
            "unquantised checkpoint"
        )
    if model.weight_format == "dummy":
        raise ConfigError(
            f"--load-format dummy makes weights that are not quantised, but {model.name} is a "
            f"{found.name} checkpoint; load its weights, or remove quantization_config from "
            "config.json"
        )
    return f"the checkpoint's own; {found.summary}"


def _weight_bytes(model_config: ResolvedModel, model: ModelFacts) -> int:
    if model_config.quantization is None:
        return model.num_parameters * DTYPE_BYTES[model_config.weight_dtype]
    size = DTYPE_BYTES[model_config.dtype]
    if model.quantized is not None:
        quantized = model.quantized.weight_bytes
    else:
        quantized = QUANTIZED_BYTES[model_config.quantization]
    return int(model.num_parameters * quantized) + model.num_embedding_parameters * size


def _resolve_memory(
    asked: MemoryConfig,
    model_config: ResolvedModel,
    execution: ResolvedExecution,
    machine: MachineFacts,
    model: ModelFacts,
    demand: Demand,
    decisions: list[Decision],
) -> ResolvedMemory:
    page_size = asked.page_size
    if page_size is None:
        page_size = DEFAULT_PAGE_SIZE
        decisions.append(Decision("page_size", page_size, "measured best; see docs/performance.md"))
    kv_cache_dtype = _resolve_kv_cache_dtype(
        asked.kv_cache_dtype, model_config.dtype, model, decisions
    )
    refuse_idle_state_options(asked, model.cache, model=model.name)
    interval = None
    if any(group.kind is CacheKind.STATE for group in model.cache):
        interval, why_interval = state_interval(
            asked,
            page_size,
            context_length=model_config.context_length,
            on_cpu=execution.device == "cpu",
        )
        if why_interval is not None:
            decisions.append(Decision("mamba_track_interval", interval, why_interval))
    groups = within(model.cache, model_config.context_length)
    plan = CachePlan(
        groups=tuple(
            group.with_dtypes(
                kv=kv_cache_dtype,
                activations=model_config.dtype,
                recurrent=asked.mamba_ssm_dtype,
            )
            for group in groups
        ),
        page_size=page_size,
        demand=demand,
        state_interval=interval or page_size,
        num_states=asked.max_mamba_cache_size,
        state_memory_ratio=asked.mamba_full_memory_ratio or 1.0,
        window_share=check_window_share(asked.swa_full_tokens_ratio, groups, model=model.name),
        held=model.held,
    )
    max_tokens = asked.max_total_tokens
    if max_tokens is None:
        max_tokens, reason = _choose_pool(
            asked.mem_fraction_static, page_size, model_config, machine, model, plan
        )
        max_tokens -= max_tokens % page_size
        if execution.device != "cpu":
            reason = f"an estimate ({reason}); measured once the weights are loaded"
        decisions.append(Decision("max_total_tokens", max_tokens, reason))
    elif max_tokens % page_size:
        whole = max_tokens - max_tokens % page_size
        decisions.append(
            Decision("max_total_tokens", whole, f"{max_tokens} in whole pages of {page_size}")
        )
    num_pages = max_tokens // page_size
    if num_pages < 1:
        raise ConfigError(
            f"the KV pool would hold {max_tokens} tokens, less than one page of {page_size}; "
            "free some memory, or set --max-total-tokens or a larger --mem-fraction-static"
        )
    if num_pages > MAX_PAGES:
        raise ConfigError(f"the KV pool would have {num_pages} pages; raise --page-size")
    pool_bytes = plan.num_bytes(max_tokens)
    if pool_bytes > machine.memory_bytes:
        raise ConfigError(
            f"--max-total-tokens {max_tokens} takes {pool_bytes / 2**30:.1f} GiB of KV but "
            f"{execution.device} has {machine.memory_bytes / 2**30:.1f} GiB; ask for fewer tokens"
        )
    if len(plan.pools) > 1:
        _explain_pools(plan, num_pages * page_size, decisions)
    return decided(
        ResolvedMemory,
        asked,
        page_size=page_size,
        max_total_tokens=num_pages * page_size,
        kv_cache_dtype=kv_cache_dtype,
        mamba_track_interval=interval,
    )


def demand_of(scheduler: ResolvedScheduler, model: ResolvedModel) -> Demand:
    """What running requests may use at once."""
    chunk = scheduler.chunked_prefill_size
    return Demand(
        num_requests=scheduler.max_running_requests,
        step_tokens=model.context_length if chunk == -1 else chunk,
    )


def _explain_pools(plan: CachePlan, num_tokens: int, decisions: list[Decision]) -> None:
    """Say beside the tokens of context how the pools share the memory."""
    why = [decision.reason for decision in decisions if decision.option == "max_total_tokens"]
    decisions[:] = [decision for decision in decisions if decision.option != "max_total_tokens"]
    reason = f"{''.join(why[-1:]) or 'asked for'}; {plan.explained(num_tokens)}"
    decisions.append(Decision("max_total_tokens", num_tokens, reason))


def _resolve_kv_cache_dtype(
    asked: str, dtype: str, model: ModelFacts, decisions: list[Decision]
) -> str:
    """The KV cache's data type; ConfigError if this model cannot have the one asked for."""
    if asked == "auto":
        decisions.append(Decision("kv_cache_dtype", dtype, "the same as --dtype"))
        return dtype
    if asked not in KV_CACHE_8_BIT:
        if asked != dtype:
            raise ConfigError(
                f"--kv-cache-dtype is {asked}, but a KV cache that is not in 8 bits has the data "
                f"type of the activations, {dtype}; leave the option out, change --dtype, or "
                f"choose one of {', '.join(KV_CACHE_8_BIT)}"
            )
        return asked
    if not model.cache:
        raise ConfigError(
            f"--kv-cache-dtype is {asked}, but {model.name} is an encoder, which keeps no keys and "
            "values; leave the option out"
        )
    dense, small = (
        sum(group.with_dtypes(kv=name, activations=dtype).unit_bytes for group in model.cache)
        for name in (dtype, asked)
    )
    reason = (
        f"asked for; a token takes {small:,} bytes instead of {dense:,} in {dtype}: "
        f"{dense / small:.2f} times the tokens in the same memory"
    )
    decisions.append(Decision("kv_cache_dtype", asked, reason))
    return asked


def _choose_pool(
    fraction: float | None,
    page_size: int,
    model_config: ResolvedModel,
    machine: MachineFacts,
    model: ModelFacts,
    plan: CachePlan,
) -> tuple[int, str]:
    # Each request's last page counts whole: a context may be shorter than a page.
    context_pages = -(-model_config.context_length // page_size)
    by_context = POOL_CONTEXTS * context_pages * page_size
    if not plan.groups:
        return by_context, f"{POOL_CONTEXTS} texts of the full context; it takes no memory"
    weight_bytes = _weight_bytes(model_config, model) + model.draft_bytes
    if fraction is not None:
        pool_bytes = int(machine.memory_bytes * fraction) - weight_bytes
        reason = (
            f"{fraction:.0%} of {machine.memory_bytes / 2**30:.1f} GiB "
            f"less {weight_bytes / 2**30:.2f} GiB of weights"
        )
        return plan.most_tokens(max(pool_bytes, 0), enough=by_context), reason
    free_bytes = max(machine.available_bytes - weight_bytes, 0)
    most_bytes = int(free_bytes * DEFAULT_POOL_FRACTION)
    by_memory = plan.most_tokens(most_bytes, enough=by_context)
    if by_context <= by_memory:
        gib = plan.num_bytes(by_context) / 2**30
        return by_context, f"{POOL_CONTEXTS} requests of the full context, {gib:.2f} GiB"
    return (
        by_memory,
        f"{DEFAULT_POOL_FRACTION:.0%} of the memory free beside weights, "
        f"{plan.num_bytes(by_memory) / 2**30:.2f} GiB",
    )


def _resolve_scheduler(
    asked: SchedulerConfig,
    parallel: ParallelConfig,
    execution: ResolvedExecution,
    decisions: list[Decision],
) -> ResolvedScheduler:
    on_cpu, num_stages = execution.device == "cpu", parallel.pp_size

    def choose(name: str, on_cpu_value: int, on_gpu_value: int, reason: str) -> int:
        value: int | None = getattr(asked, name)
        if value is not None:
            return value
        chosen = on_cpu_value if on_cpu else on_gpu_value
        decisions.append(Decision(name, chosen, reason))
        return chosen

    if asked.disable_overlap_schedule:
        asked = replace(asked, overlap_depth=1)
    takes_priorities = asked.enable_priority_scheduling
    if asked.schedule_policy == "priority" and not takes_priorities:
        takes_priorities = True
        decisions.append(
            Decision("enable_priority_scheduling", True, "--schedule-policy priority implies it")
        )
    return decided(
        ResolvedScheduler,
        asked,
        enable_priority_scheduling=takes_priorities,
        max_running_requests=choose(
            "max_running_requests", 128, 1024, "what a step still gains by"
        ),
        max_queued_requests=choose(
            "max_queued_requests", 4096, 4096, "bounds the memory of a flood"
        ),
        chunked_prefill_size=choose(
            "chunked_prefill_size", 1024, 8192, "bounds the wait of decodes beside a long prompt"
        ),
        overlap_depth=choose("overlap_depth", num_stages, num_stages, "a step for each stage")
        if num_stages > 1
        else choose(
            "overlap_depth", 1, 2, "a CPU's step uses all cores; a GPU's leaves the host idle"
        ),
    )
