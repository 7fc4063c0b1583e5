"""Which options go together with which models."""

from __future__ import annotations

from sapwood.base.errors import ConfigError
from sapwood.schema.cache import CacheKind
from sapwood.schema.config.disaggregation import Part
from sapwood.schema.config.drafting import MODEL_ALGORITHMS
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.facts import ModelFacts


def check_speculation(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if the model cannot have its tokens guessed, or nobody could guess them."""
    algorithm = asked.speculation.speculative_algorithm
    given = asked.drafting.given
    if given and algorithm not in MODEL_ALGORITHMS:
        raise ConfigError(
            f"{', '.join(given)} does nothing without --speculative-algorithm "
            f"{' or '.join(MODEL_ALGORITHMS)}; give both or neither"
        )
    if algorithm is None:
        return
    if algorithm in MODEL_ALGORITHMS and asked.parallel.num_ranks > 1:
        raise ConfigError(
            f"--speculative-algorithm {algorithm} computes its draft model on one rank so far, but "
            f"the model has {asked.parallel.num_ranks}; guess with NGRAM, or leave out "
            "--tp-size and --pp-size"
        )
    if model.whole_prompts:
        raise ConfigError(
            f"--speculative-algorithm {algorithm} guesses output tokens, but {model.name} is an "
            "encoder, which has none; leave it out"
        )


def why_no_trees(asked: EngineConfig, model: ModelFacts) -> str | None:
    """Why guesses cannot be trees, only chains; None if they can be trees."""
    if asked.parallel.num_ranks > 1:
        return "only one of the ranks knows which guesses of a tree were right"
    kinds = {
        CacheKind.WINDOW: "attention with a sliding window",
        CacheKind.LATENT: "latent attention",
        CacheKind.STATE: "a layer that keeps a state",
    }
    for group in model.cache:
        if group.kind in kinds:
            return f"{kinds[group.kind]} takes guesses one after the other"
    if model.positions_are_places:
        return "its attention takes a token's place in the cache for its position (ALiBi, chunks)"
    return None


def check_tiers(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if the model's prefixes cannot go to further tiers."""
    if given := asked.tiers.given_in_vain:
        raise ConfigError(
            f"{', '.join(given)} does nothing without --enable-hierarchical-cache; add that, or "
            "leave it out"
        )
    if not asked.tiers.enable_hierarchical_cache:
        return
    if asked.memory.disable_radix_cache:
        raise ConfigError(
            "--enable-hierarchical-cache keeps prefixes, and --disable-radix-cache keeps none; "
            "leave one out"
        )
    if model.makes_numbers:
        raise ConfigError(
            f"{model.name} makes embeddings or scores; --enable-hierarchical-cache keeps the "
            "prefixes of models that generate, so leave it out"
        )


def check_disaggregation(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if the engine cannot hand over the pages of the model's prompts, or take them."""
    config = asked.disaggregation
    if given := config.given_in_vain:
        raise ConfigError(
            f"{', '.join(given)} does nothing with --disaggregation-mode "
            f"{config.disaggregation_mode}; leave it out"
        )
    if config.part is Part.WHOLE:
        return
    mode = f"--disaggregation-mode {config.disaggregation_mode}"
    if asked.parallel.num_ranks > 1 or asked.parallel.dp_size > 1:
        raise ConfigError(
            f"{mode} is for engines of one rank so far: leave out --tp-size, --pp-size and "
            "--dp-size, and start several engines behind `sapwood gateway --pd-disaggregation`"
        )
    if asked.memory.disable_radix_cache:
        raise ConfigError(
            f"{mode} hands pages over as prefixes, and --disable-radix-cache keeps none; leave one "
            "out"
        )
    if model.makes_numbers:
        raise ConfigError(
            f"{model.name} makes embeddings or scores, which end with the prompt; leave out {mode}"
        )
    if config.part is Part.DECODE and asked.tiers.enable_hierarchical_cache:
        raise ConfigError(
            f"{mode} has memory of the host's of its own, into which pages come; leave out "
            "--enable-hierarchical-cache, or give it to the engines that read prompts"
        )


def check_adapters(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if the model cannot have the adapters that were asked for."""
    if not asked.lora.is_on:
        return
    if model.makes_numbers:
        raise ConfigError(
            f"{model.name} makes embeddings or scores; LoRA adapters are served with models that "
            "generate. Merge the adapter into the model, or leave out --enable-lora"
        )
    parallel = asked.parallel
    if parallel.ep_size > 1:
        raise ConfigError(
            "LoRA adapters go together with --tp-size and --pp-size, but not with experts on "
            "different ranks (--ep-size); leave that out, or --enable-lora"
        )
    if parallel.num_ranks > 1 and asked.lora.enable_lora_overlap_loading:
        raise ConfigError(
            "--enable-lora-overlap-loading is for one rank: several would have to wait for each "
            "other's copies; leave it out, or --tp-size and --pp-size"
        )
    if asked.model.model_impl == "transformers":
        raise ConfigError(
            f"{model.name} is computed by the transformers library, whose layers have no place for "
            "LoRA adapters. Merge the adapter into the model, or leave out --enable-lora"
        )


def check_shared_feed_forward(asked: EngineConfig, model: ModelFacts) -> None:
    """ConfigError if ranks with requests of their own cannot share the model's feed-forwards."""
    if not asked.parallel.enable_dp_attention:
        return
    if asked.speculation.speculative_algorithm is not None:
        raise ConfigError(
            "--enable-dp-attention does not go together with --speculative-algorithm; leave out "
            "one of them"
        )
    if asked.lora.is_on:
        raise ConfigError(
            "--enable-dp-attention does not go together with LoRA adapters: a rank does not know "
            "the adapters of the others' tokens; leave out one of them"
        )
    given = asked.execution.options_of_experts
    if given and asked.parallel.moe_a2a_backend == "none":
        raise ConfigError(
            f"--enable-dp-attention does not go together with {' and '.join(given)}: a rank "
            "chooses experts for all ranks' tokens; leave out one of them, or send tokens to their "
            "experts (--moe-a2a-backend)"
        )
    if model.makes_numbers or asked.model.model_impl == "transformers":
        why = (
            "makes embeddings or scores"
            if model.makes_numbers
            else "is computed by the transformers library"
        )
        raise ConfigError(f"{model.name} {why}; leave out --enable-dp-attention, or --tp-size")
