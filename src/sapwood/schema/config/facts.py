"""What resolution is told of the machine and of the model."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sapwood.schema.cache import CacheGroup
from sapwood.schema.stage import Stage


@dataclass(frozen=True, slots=True, kw_only=True)
class MachineFacts:
    """What resolution needs to know of the machine.

    device            the device asked for, else the best one: "cpu", "cuda", "cuda:0"
    memory_bytes      memory of that device
    available_bytes   memory of that device that is free now
    num_cores         cores this process may use
    fast_bfloat16     whether bf16 matrix products have instructions of their own
    """

    device: str
    memory_bytes: int
    available_bytes: int
    num_cores: int
    fast_bfloat16: bool


@dataclass(frozen=True, slots=True)
class CheckpointFacts:
    """How another tool quantised the checkpoint.

    name          the format's name, as --quantization spells it
    summary       the stored and the computed numbers, in words
    weight_bytes  bytes per weight of a quantised layer
    """

    name: str
    summary: str
    weight_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What resolution needs to know of the model.

    context_length  tokens of one request when nobody asks for another number
    max_context_length  tokens that the model's positions reach
    dtype           data type of the checkpoint
    num_parameters  weights, counted once where they are tied
    num_embedding_parameters  weights of the token embedding, which is not quantised
    weight_format   format of the weight files: "safetensors", "gguf", …; "dummy": random weights
    file_bytes      size of the weight files; 0: there are none
    cache           what tokens and requests leave behind in the model's layers; empty: nothing
    held            those of these layers that this rank has, as in CachePlan
    whole_prompts   the model is an encoder, which computes a text in one step and keeps no KV
    makes_numbers   the model makes embeddings or scores instead of text
    draft_bytes     about what the weights of its draft model take; 0: there is none
    positions_are_places  whether attention takes a token's place in the cache for its position
    quantized       how the checkpoint is quantised; None: not at all, or it is a GGUF file
    """

    name: str
    context_length: int
    max_context_length: int
    dtype: str
    num_parameters: int
    cache: tuple[CacheGroup, ...] = ()
    held: frozenset[int] | None = None
    num_embedding_parameters: int = 0
    weight_format: str = ""
    file_bytes: int = 0
    whole_prompts: bool = False
    makes_numbers: bool = False
    draft_bytes: int = 0
    positions_are_places: bool = False
    quantized: CheckpointFacts | None = None

    def of_stage(self, stage: Stage, num_layers: int, held: frozenset[int]) -> ModelFacts:
        """The same of one stage of a model with so many layers, of which the caches `held` are the
        stage's; all layers are taken to be alike."""
        if stage.count == 1:
            return self

        def share(of_layers: int, of_vocabulary: int) -> int:
            at_an_end = stage.is_first or stage.is_last
            return -(-of_layers * len(stage.layers) // num_layers) + at_an_end * of_vocabulary

        vocabulary = self.num_embedding_parameters
        num_parameters = share(self.num_parameters - vocabulary, vocabulary)
        return replace(
            self,
            num_parameters=num_parameters,
            file_bytes=-(-self.file_bytes * num_parameters // self.num_parameters),
            held=held,
        )

    def of_rank(self, num_ranks: int) -> ModelFacts:
        """The same of one of the ranks that share each layer: its weights, and its part of what
        tokens leave behind."""
        return replace(
            self,
            num_parameters=-(-self.num_parameters // num_ranks),
            num_embedding_parameters=-(-self.num_embedding_parameters // num_ranks),
            file_bytes=-(-self.file_bytes // num_ranks),
            cache=tuple(group.of_rank(num_ranks) for group in self.cache),
        )
