"""The configs of all components: what they refuse, and that they fit together."""

from collections import Counter
from dataclasses import fields, replace

import msgspec
import pytest

from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS, EngineConfig
from sapwood.schema.config.execution import ExecutionConfig, ResolvedExecution
from sapwood.schema.config.memory import MemoryConfig, ResolvedMemory
from sapwood.schema.config.model import ModelConfig, ResolvedModel
from sapwood.schema.config.observability import ObservabilityConfig
from sapwood.schema.config.options import decided, option_specs
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.scheduler import ResolvedScheduler, SchedulerConfig
from sapwood.schema.config.server import ServerConfig

ALL = (*COMPONENTS, ServerConfig, ObservabilityConfig)

JOINT = {"enable_dp_attention": True, "tp_size": 2, "dp_size": 2}


def test_the_engine_has_exactly_the_components():
    types = [type(getattr(EngineConfig(), part.name)) for part in fields(EngineConfig)]
    assert tuple(types) == COMPONENTS


def test_no_two_options_share_a_name_or_an_alias():
    names = [
        name.replace("-", "_")
        for config in ALL
        for spec in option_specs(config)
        for name in (spec.name, *spec.aliases)
    ]
    assert [name for name, count in Counter(names).items() if count > 1] == []


@pytest.mark.parametrize("config", ALL)
def test_every_field_is_an_option_with_a_help(config):
    specs = option_specs(config)
    assert [spec.name for spec in specs] == [field.name for field in fields(config)]
    for spec in specs:
        assert spec.help.endswith((".", "random."))
        assert spec.default is None or spec.type is type(spec.default)
        assert not spec.choices or spec.default is None or spec.default in spec.choices


@pytest.mark.parametrize(
    ("resolved", "values"),
    [
        (ResolvedModel, {"served_model_name": "m", "weight_dtype": "float16", "context_length": 8}),
        (ResolvedMemory, {"page_size": 16, "max_total_tokens": 64}),
        (ResolvedExecution, {"device": "cpu", "num_threads": 1}),
        (
            ResolvedScheduler,
            {
                "max_running_requests": 1,
                "max_queued_requests": 1,
                "chunked_prefill_size": 8,
                "overlap_depth": 1,
            },
        ),
    ],
)
def test_a_resolved_component_has_the_same_options_and_leaves_none_of_its_own_open(
    resolved, values
):
    asked = resolved.__mro__[1]
    described = [replace(spec, optional=True) for spec in option_specs(resolved)]
    assert described == [replace(spec, optional=True) for spec in option_specs(asked)]
    assert set(resolved.__annotations__) == set(values)
    assert decided(resolved, asked(), **values) == resolved(**values)
    for name in values:
        flag = "--" + name.replace("_", "-")
        with pytest.raises(ConfigError, match=f"{flag} is None but must be"):
            decided(resolved, asked(), **{**values, name: None})


def test_a_config_survives_the_way_to_another_process():
    config = EngineConfig(
        model=ModelConfig(model="a/b", revision="main"),
        memory=MemoryConfig(page_size=32, mem_fraction_static=0.5),
        scheduler=SchedulerConfig(schedule_policy="fcfs"),
    )
    assert msgspec.json.decode(msgspec.json.encode(config), type=EngineConfig) == config


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (ModelConfig, {"dtype": "int3"}),
        (ModelConfig, {"load_format": "zip"}),
        (ModelConfig, {"model": ""}),
        (ModelConfig, {"context_length": 1}),
        (MemoryConfig, {"page_size": 0}),
        (MemoryConfig, {"page_size": 1025}),
        (MemoryConfig, {"max_total_tokens": 0}),
        (MemoryConfig, {"mem_fraction_static": 0.0}),
        (MemoryConfig, {"mem_fraction_static": 1.0}),
        (MemoryConfig, {"radix_eviction_policy": "fifo"}),
        (SchedulerConfig, {"max_running_requests": 0}),
        (SchedulerConfig, {"max_queued_requests": -1}),
        (SchedulerConfig, {"chunked_prefill_size": 0}),
        (SchedulerConfig, {"chunked_prefill_size": -2}),
        (SchedulerConfig, {"schedule_policy": "lifo"}),
        (SchedulerConfig, {"schedule_conservativeness": -0.1}),
        (SchedulerConfig, {"schedule_conservativeness": float("inf")}),
        (SchedulerConfig, {"in_batch_prefix_threshold": -2}),
        (SchedulerConfig, {"overlap_depth": 0}),
        (ExecutionConfig, {"num_threads": 0}),
        (ParallelConfig, {"tp_size": 0}),
        (ParallelConfig, {"pp_size": 0}),
        (ParallelConfig, {"pp_layer_partition": "3", "pp_size": 2}),
        (ParallelConfig, {"pp_layer_partition": "3,0", "pp_size": 2}),
        (ParallelConfig, {"pp_layer_partition": "3,-1", "pp_size": 2}),
        (ParallelConfig, {"pp_max_micro_batch_size": 1}),
        (ParallelConfig, {"pp_max_micro_batch_size": 0, "pp_size": 2}),
        (ParallelConfig, {"dp_size": 0}),
        (ParallelConfig, {"dp_size": 65}),
        (ParallelConfig, {"load_balance_method": "round_robin"}),
        (ParallelConfig, {"load_balance_method": "follow_bootstrap_room", "dp_size": 2}),
        (ParallelConfig, {"enable_dp_lm_head": True}),
        (ParallelConfig, {"enable_dp_attention": True, "tp_size": 2}),
        (ParallelConfig, {"enable_dp_attention": True, "tp_size": 4, "dp_size": 2}),
        (ParallelConfig, JOINT | {"pp_size": 2}),
        (ParallelConfig, JOINT | {"enable_eplb": True, "ep_size": 2}),
        (ParallelConfig, {"nnodes": 0}),
        (ParallelConfig, {"nnodes": 2, "tp_size": 3, "dist_init_addr": "a:1"}),
        (ParallelConfig, {"node_rank": 1}),
        (ParallelConfig, {"nnodes": 2, "tp_size": 2}),
        (ParallelConfig, {"dist_init_addr": "10.0.0.1"}),
        (ParallelConfig, {"dist_timeout": 0.0}),
        (ServerConfig, {"port": -1}),
        (ServerConfig, {"port": 65536}),
        (ServerConfig, {"log_level": "loud"}),
        (ServerConfig, {"drain_timeout": -1.0}),
        (ServerConfig, {"start_timeout": float("nan")}),
    ],
)
def test_a_value_out_of_range_is_refused_by_its_flag(config, values):
    flag = "--" + next(iter(values)).replace("_", "-")
    with pytest.raises(ConfigError, match=flag):
        config(**values)


@pytest.mark.parametrize(
    ("config", "values"),
    [
        (ModelConfig, {"context_length": 2}),
        (MemoryConfig, {"page_size": 1024}),
        (MemoryConfig, {"mem_fraction_static": 0.999}),
        (SchedulerConfig, {"chunked_prefill_size": -1}),
        (SchedulerConfig, {"in_batch_prefix_threshold": -1}),
        (SchedulerConfig, {"max_queued_requests": 0}),
        (SchedulerConfig, {"schedule_conservativeness": 0.0}),
        (ServerConfig, {"port": 0}),
        (ServerConfig, {"drain_timeout": 0.0}),
    ],
)
def test_the_ends_of_a_range_belong_to_it(config, values):
    [(name, value)] = values.items()
    assert getattr(config(**values), name) == value
