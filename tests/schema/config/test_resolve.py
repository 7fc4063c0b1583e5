from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.schema.cache import keys_and_values
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.drafting import DraftingConfig
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.execution import DEFAULT_CPU_PRODUCTS, ExecutionConfig
from sapwood.schema.config.facts import MachineFacts, ModelFacts
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.resolve import DEFAULT_PAGE_SIZE, resolve
from sapwood.schema.config.scheduler import SchedulerConfig
from sapwood.schema.config.speculation import SpeculationConfig
from sapwood.schema.stage import stages_of, whole_model

GIB = 2**30
CPU = MachineFacts(
    device="cpu",
    memory_bytes=24 * GIB,
    available_bytes=20 * GIB,
    num_cores=2,
    fast_bfloat16=True,
)
GPU = replace(CPU, device="cuda", memory_bytes=139 * GIB, available_bytes=138 * GIB)
MODEL = ModelFacts(
    name="small",
    context_length=8192,
    max_context_length=16384,
    dtype="bfloat16",
    num_parameters=135_000_000,
    cache=(keys_and_values(range(30), num_kv_heads=3, head_dim=64),),
)
TOKEN_BYTES = 30 * 2 * 3 * 64 * 2


@pytest.mark.parametrize(
    ("asked", "checkpoint", "weight_format", "expected"),
    [
        ("auto", "bfloat16", "safetensors", "bfloat16"),
        ("auto", "float16", "safetensors", "float16"),
        ("auto", "float32", "safetensors", "float16"),
        ("auto", "bfloat16", "gguf", "float16"),  # stands for quantised blocks
        ("auto", "float16", "gguf", "float16"),
        ("float32", "bfloat16", "safetensors", "bfloat16"),  # exact, so no need to ask
        ("float32", "float32", "safetensors", "float32"),
        ("float32", "bfloat16", "gguf", "float32"),
    ],
)
def test_weights_keep_16_bits_where_activations_are_float32(
    asked, checkpoint, weight_format, expected
):
    model = replace(MODEL, dtype=checkpoint, weight_format=weight_format)
    machine = replace(CPU, fast_bfloat16=False)
    config, decisions = resolve(EngineConfig(model=ModelConfig(dtype=asked)), machine, model)
    assert config.model.dtype == "float32"
    assert config.model.weight_dtype == expected
    assert "weight_dtype" in reasons(decisions)


def test_the_weights_own_dtype_can_be_asked_for():
    asked = EngineConfig(model=ModelConfig(dtype="float32", weight_dtype="float32"))
    config, decisions = resolve(asked, CPU, MODEL)
    assert config.model.weight_dtype == "float32"
    assert "weight_dtype" not in reasons(decisions)


@pytest.mark.parametrize(
    ("dtype", "machine"), [("bfloat16", CPU), ("float32", GPU), ("float16", GPU)]
)
def test_weights_of_another_dtype_need_float32_activations_on_a_cpu(dtype, machine):
    weight_dtype = "float32" if dtype == "bfloat16" else "bfloat16"
    asked = EngineConfig(model=ModelConfig(dtype=dtype, weight_dtype=weight_dtype))
    with pytest.raises(ConfigError, match=f"--weight-dtype {weight_dtype} needs --dtype"):
        resolve(asked, machine, MODEL)


def test_replicas_share_a_cpu_and_no_gpu():
    asked = EngineConfig(parallel=ParallelConfig(dp_size=4))
    large = replace(MODEL, num_parameters=2_000_000_000)
    machine = replace(CPU, num_cores=8)
    one, _ = resolve(EngineConfig(), replace(machine, available_bytes=5 * GIB), large)
    share, decisions = resolve(asked, machine, large)
    assert share.execution.num_threads == 2
    assert share.memory.max_total_tokens == one.memory.max_total_tokens
    assert "load_balance_method" in reasons(decisions)
    few, _ = resolve(asked, CPU, MODEL)
    assert few.execution.num_threads == 1
    on_gpu = [resolve(asked, GPU, large), resolve(EngineConfig(), GPU, large)]
    assert on_gpu[0][0].memory == on_gpu[1][0].memory


def test_a_pipeline_has_a_step_in_flight_for_each_stage():
    asked = EngineConfig(parallel=ParallelConfig(pp_size=3))
    for machine in (CPU, GPU):
        config, decisions = resolve(asked, machine, MODEL)
        assert config.scheduler.overlap_depth == 3
        assert reasons(decisions)["overlap_depth"] == "a step for each stage"
    one_by_one = replace(asked, scheduler=SchedulerConfig(disable_overlap_schedule=True))
    assert resolve(one_by_one, CPU, MODEL)[0].scheduler.overlap_depth == 1


def test_a_stage_counts_its_own_layers():
    stages = [
        MODEL.of_stage(stage, 4, frozenset(stage.layers)) for stage in stages_of(4, 2, [1, 3])
    ]
    weights = MODEL.num_parameters - MODEL.num_embedding_parameters
    sizes = [stage.num_parameters - MODEL.num_embedding_parameters for stage in stages]
    assert sizes == [-(-weights // 4), -(-weights * 3 // 4)]
    assert [stage.held for stage in stages] == [frozenset([0]), frozenset([1, 2, 3])]
    assert MODEL.of_stage(whole_model(4), 4, frozenset(range(4))) == MODEL


def reasons(decisions):
    return {decision.option: decision.reason for decision in decisions}


def test_nothing_asked_gives_a_config_without_open_choices():
    config, decisions = resolve(EngineConfig(), CPU, MODEL)
    assert config.execution.device == "cpu"
    assert config.execution.num_threads == 2
    assert config.model.dtype == "bfloat16"
    assert config.model.context_length == 8192
    assert config.model.served_model_name == "default"
    assert config.memory.page_size == DEFAULT_PAGE_SIZE
    assert config.scheduler.max_running_requests == 128
    assert config.scheduler.overlap_depth == 1
    assert None not in (
        config.memory.max_total_tokens,
        config.scheduler.max_queued_requests,
        config.scheduler.chunked_prefill_size,
    )
    assert set(reasons(decisions)) == {
        "cpu_products",
        "device",
        "num_threads",
        "dtype",
        "context_length",
        "served_model_name",
        "page_size",
        "kv_cache_dtype",
        "max_total_tokens",
        "max_running_requests",
        "max_queued_requests",
        "chunked_prefill_size",
        "overlap_depth",
    }


def test_what_was_asked_is_kept_and_needs_no_reason():
    asked = EngineConfig(
        model=ModelConfig(
            dtype="float32",
            weight_dtype="float32",
            context_length=512,
            served_model_name="mine",
        ),
        memory=MemoryConfig(page_size=8, max_total_tokens=4096, kv_cache_dtype="float32"),
        scheduler=SchedulerConfig(
            max_running_requests=4,
            max_queued_requests=0,
            chunked_prefill_size=-1,
            overlap_depth=2,
        ),
        execution=ExecutionConfig(device="cpu", num_threads=1, cpu_products="exact"),
    )
    config, decisions = resolve(asked, CPU, MODEL)
    assert (config.flat(), decisions) == (asked.flat(), [])


def test_a_resolved_config_resolves_to_itself():
    config, _ = resolve(EngineConfig(), CPU, MODEL)
    assert resolve(config, CPU, MODEL) == (config, [])


@pytest.mark.parametrize(
    ("device", "fast", "checkpoint", "dtype"),
    [
        ("cpu", True, "bfloat16", "bfloat16"),
        ("cpu", True, "float16", "bfloat16"),
        ("cpu", True, "float32", "bfloat16"),
        ("cpu", False, "bfloat16", "float32"),
        ("cuda", False, "bfloat16", "bfloat16"),
        ("cuda", False, "float16", "float16"),
        ("cuda", False, "float32", "bfloat16"),
    ],
)
def test_dtype_auto(device, fast, checkpoint, dtype):
    machine = replace(CPU, device=device, fast_bfloat16=fast)
    config, decisions = resolve(EngineConfig(), machine, replace(MODEL, dtype=checkpoint))
    assert config.model.dtype == dtype
    assert reasons(decisions)["dtype"]


def test_a_gpu_has_other_defaults():
    config, _ = resolve(EngineConfig(), GPU, MODEL)
    assert config.scheduler.overlap_depth == 2
    assert config.scheduler.max_running_requests == 1024


@pytest.mark.parametrize("length", [16385, 100_000])
def test_a_context_longer_than_the_model_reaches_is_refused(length):
    asked = EngineConfig(model=ModelConfig(context_length=length))
    with pytest.raises(ConfigError, match=r"--context-length.*16384.*small"):
        resolve(asked, CPU, MODEL)


def test_a_context_longer_than_the_default_may_be_asked_for():
    asked = EngineConfig(model=ModelConfig(context_length=16384))
    assert resolve(asked, CPU, MODEL)[0].model.context_length == 16384


def test_the_default_pool_holds_some_full_contexts_if_memory_allows():
    config, decisions = resolve(EngineConfig(), GPU, MODEL)
    assert config.memory.max_total_tokens == 32 * 8192
    assert "32 requests of the full context" in reasons(decisions)["max_total_tokens"]


def test_the_default_pool_leaves_most_of_a_small_machine_s_memory_free():
    small = replace(CPU, available_bytes=2 * GIB)
    config, decisions = resolve(EngineConfig(), small, MODEL)
    pool_bytes = config.memory.max_total_tokens * TOKEN_BYTES
    free_bytes = small.available_bytes - 2 * MODEL.num_parameters
    assert 0.24 * free_bytes < pool_bytes <= 0.25 * free_bytes
    assert "25% of the memory free" in reasons(decisions)["max_total_tokens"]


def test_a_memory_fraction_counts_the_weights_in():
    asked = EngineConfig(memory=MemoryConfig(mem_fraction_static=0.5))
    config, decisions = resolve(asked, CPU, MODEL)
    used = config.memory.max_total_tokens * TOKEN_BYTES + 2 * MODEL.num_parameters
    assert 12 * GIB - 17 * TOKEN_BYTES < used <= 12 * GIB
    assert reasons(decisions)["max_total_tokens"].startswith("50% of 24.0 GiB")


def test_asked_tokens_overrule_a_memory_fraction():
    asked = EngineConfig(memory=MemoryConfig(mem_fraction_static=0.5, max_total_tokens=1600))
    config, _ = resolve(asked, CPU, MODEL)
    assert config.memory.max_total_tokens == 1600


def test_asked_tokens_are_rounded_down_to_pages_and_that_is_said():
    asked = EngineConfig(memory=MemoryConfig(max_total_tokens=1000))
    config, decisions = resolve(asked, CPU, MODEL)
    assert config.memory.max_total_tokens == 992
    assert Decision("max_total_tokens", 992, "1000 in whole pages of 16") in decisions


@pytest.mark.parametrize(
    ("memory", "machine"),
    [
        (MemoryConfig(max_total_tokens=15), CPU),
        (MemoryConfig(mem_fraction_static=0.001), CPU),
        (MemoryConfig(), replace(CPU, available_bytes=1000)),
    ],
)
def test_a_pool_without_a_page_is_refused(memory, machine):
    with pytest.raises(ConfigError, match="less than one page of 16"):
        resolve(EngineConfig(memory=memory), machine, MODEL)


@pytest.mark.parametrize("machine", [CPU, GPU])
def test_a_pool_larger_than_the_memory_is_refused(machine):
    asked = EngineConfig(memory=MemoryConfig(max_total_tokens=10_000_000))
    with pytest.raises(ConfigError, match=rf"GiB of KV but {machine.device} has"):
        resolve(asked, machine, MODEL)


def test_a_page_table_has_32_bit_entries():
    asked = EngineConfig(memory=MemoryConfig(page_size=1, max_total_tokens=2**31))
    with pytest.raises(ConfigError, match="raise --page-size"):
        resolve(asked, CPU, MODEL)


def test_a_decision_reads_as_a_sentence():
    assert str(Decision("page_size", 16, "measured best")) == "page_size = 16 (measured best)"


@given(
    page_size=st.integers(1, 1024),
    available_gib=st.floats(1.0, 24.0),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    context_length=st.integers(2, 8192),
)
def test_whatever_is_asked_the_pool_is_whole_pages_that_fit(
    page_size, available_gib, dtype, context_length
):
    machine = replace(CPU, available_bytes=int(available_gib * GIB))
    asked = EngineConfig(
        model=ModelConfig(dtype=dtype, context_length=context_length),
        memory=MemoryConfig(page_size=page_size),
    )
    config, _ = resolve(asked, machine, MODEL)
    tokens = config.memory.max_total_tokens
    token_bytes = 30 * 2 * 3 * 64 * DTYPE_BYTES[dtype]
    assert tokens % page_size == 0
    assert 0 < tokens * token_bytes <= machine.available_bytes


# ---- encoders ------------------------------------------------------------------------------------

ENCODER = ModelFacts(
    name="encoder",
    context_length=256,
    max_context_length=512,
    dtype="float32",
    num_parameters=1000,
    whole_prompts=True,
)


def encoder_config(**values: object) -> tuple[EngineConfig, dict[str, str]]:
    machine = MachineFacts(
        device="cpu",
        memory_bytes=2**30,
        available_bytes=2**29,
        num_cores=2,
        fast_bfloat16=True,
    )
    config, decisions = resolve(EngineConfig.of(values), machine, ENCODER)
    return config, {decision.option: decision.reason for decision in decisions}


def test_an_encoder_keeps_its_numbers_and_no_prefixes() -> None:
    config, reasons = encoder_config()
    assert config.model.dtype == "float32"
    assert "compared with those of other programs" in reasons["dtype"]
    assert config.memory.disable_radix_cache
    assert config.memory.max_total_tokens == 32 * 256
    assert config.scheduler.chunked_prefill_size == 1024
    assert encoder_config(dtype="bfloat16")[0].model.dtype == "bfloat16"


def test_an_encoders_step_holds_a_whole_context() -> None:
    facts = {"context_length": 512}
    config, _ = encoder_config(**facts)
    assert config.scheduler.chunked_prefill_size == 1024
    assert encoder_config(chunked_prefill_size=-1)[0].scheduler.chunked_prefill_size == -1
    assert encoder_config(chunked_prefill_size=256)[0].scheduler.chunked_prefill_size == 256
    with pytest.raises(ConfigError, match=r"--chunked-prefill-size is 255.*of up to 256 tokens"):
        encoder_config(chunked_prefill_size=255)


def test_when_steps_with_guesses_overlap_is_said():
    guessing = SpeculationConfig(speculative_algorithm="NGRAM")
    _, decisions = resolve(EngineConfig(speculation=guessing), GPU, MODEL)
    assert reasons(decisions)["overlap_depth"].endswith(
        "steps overlap only while none promise to pay: guesses are made of the tokens that a step "
        "brings"
    )
    asked = EngineConfig(speculation=guessing, scheduler=SchedulerConfig(overlap_depth=2))
    _, decisions = resolve(asked, CPU, MODEL)
    assert reasons(decisions)["overlap_depth"].startswith("asked for; with guesses, steps overlap")
    drafting = DraftingConfig(speculative_draft_model_path="draft", speculative_eagle_topk=2)
    by_model = SpeculationConfig(speculative_algorithm="STANDALONE")
    trees = EngineConfig(speculation=by_model, drafting=drafting)
    _, decisions = resolve(trees, GPU, MODEL)
    assert reasons(decisions)["overlap_depth"].endswith("promise to pay: guesses are trees")
    chains = replace(trees, drafting=replace(drafting, speculative_eagle_topk=1))
    _, decisions = resolve(chains, GPU, MODEL)
    assert reasons(decisions)["overlap_depth"].endswith("; steps with guesses overlap, too")
    _, decisions = resolve(EngineConfig(speculation=guessing), CPU, MODEL)
    assert "both measured" in reasons(decisions)["speculative_num_draft_tokens"]
    fixed = replace(guessing, disable_speculative_adaptation=True)
    _, decided = resolve(EngineConfig(speculation=fixed), CPU, MODEL)
    assert "speculative_num_draft_tokens" not in reasons(decided)
    assert "guesses" not in reasons(decisions)["overlap_depth"]


def test_deterministic_inference_takes_exact_products() -> None:
    def resolved(machine: MachineFacts = CPU, **options: Any) -> tuple[Any, list[Decision]]:
        asked = EngineConfig(execution=ExecutionConfig(**options))
        return resolve(asked, machine, MODEL)

    config, decisions = resolved(enable_deterministic_inference=True)
    assert config.execution.cpu_products == "exact"
    assert "--enable-deterministic-inference wants it" in [one.reason for one in decisions]
    assert resolved(cpu_products="fast")[0].execution.cpu_products == "fast"
    config, decisions = resolved()
    assert config.execution.cpu_products == DEFAULT_CPU_PRODUCTS == "exact"
    assert reasons(decisions)["cpu_products"] == "an answer depends on its request alone"
    with pytest.raises(ConfigError, match="--cpu-products fast lets a row depend"):
        resolved(cpu_products="fast", enable_deterministic_inference=True)
    assert resolved(GPU)[0].execution.cpu_products is None
    with pytest.raises(ConfigError, match="--cpu-products exact does nothing on cuda"):
        resolved(GPU, cpu_products="exact")
    config, _ = resolved(GPU, enable_deterministic_inference=True)
    assert config.execution.enable_deterministic_inference
