"""Everything one engine needs; sent to its process as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from sapwood.schema.config.disaggregation import DisaggregationConfig
from sapwood.schema.config.drafting import DraftingConfig
from sapwood.schema.config.execution import ExecutionConfig, ResolvedExecution
from sapwood.schema.config.grammar import GrammarConfig
from sapwood.schema.config.lora import LoraConfig
from sapwood.schema.config.media import MediaConfig
from sapwood.schema.config.memory import MemoryConfig, ResolvedMemory
from sapwood.schema.config.model import ModelConfig, ResolvedModel
from sapwood.schema.config.options import build
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.config.scheduler import ResolvedScheduler, SchedulerConfig
from sapwood.schema.config.speculation import SpeculationConfig
from sapwood.schema.config.tiers import TiersConfig
from sapwood.schema.config.vision import VisionConfig

COMPONENTS: tuple[type, ...] = (
    ModelConfig,
    MemoryConfig,
    TiersConfig,
    SchedulerConfig,
    ExecutionConfig,
    ParallelConfig,
    DisaggregationConfig,
    GrammarConfig,
    SpeculationConfig,
    DraftingConfig,
    LoraConfig,
    VisionConfig,
    MediaConfig,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """What was asked: an option that nobody gave may be None."""

    model: ModelConfig = field(default_factory=ModelConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    tiers: TiersConfig = field(default_factory=TiersConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    execution: ExecutionConfig = field(default_factory=ExecutionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    disaggregation: DisaggregationConfig = field(default_factory=DisaggregationConfig)
    grammar: GrammarConfig = field(default_factory=GrammarConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    drafting: DraftingConfig = field(default_factory=DraftingConfig)
    lora: LoraConfig = field(default_factory=LoraConfig)
    vision: VisionConfig = field(default_factory=VisionConfig)
    media: MediaConfig = field(default_factory=MediaConfig)

    def flat(self) -> dict[str, Any]:
        """All components' options by name."""
        parts = asdict(self).values()
        return {name: value for part in parts for name, value in part.items()}

    def shown(self) -> dict[str, Any]:
        """The same for others to read: what is secret is only said to be there."""
        secrets = {one.name for kind in COMPONENTS for one in fields(kind) if not one.repr}
        return {
            name: "(not shown)" if value is not None and name in secrets else value
            for name, value in self.flat().items()
        }

    @staticmethod
    def of(values: Mapping[str, Any]) -> EngineConfig:
        """The configuration from option values by name; each goes to the component that has it."""
        return EngineConfig(
            model=build(ModelConfig, values),
            memory=build(MemoryConfig, values),
            tiers=build(TiersConfig, values),
            scheduler=build(SchedulerConfig, values),
            execution=build(ExecutionConfig, values),
            parallel=build(ParallelConfig, values),
            disaggregation=build(DisaggregationConfig, values),
            grammar=build(GrammarConfig, values),
            speculation=build(SpeculationConfig, values),
            drafting=build(DraftingConfig, values),
            lora=build(LoraConfig, values),
            vision=build(VisionConfig, values),
            media=build(MediaConfig, values),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedConfig(EngineConfig):
    """What will run: the same options, of which those that have been decided are never None.

    Each resolved component is a subclass that declares only the decided options again, with
    narrower types. So an option is described once, mypy knows what is decided, and a function that
    needs decided values asks for this type, which `resolve` alone makes.
    """

    model: ResolvedModel
    memory: ResolvedMemory
    scheduler: ResolvedScheduler
    execution: ResolvedExecution
