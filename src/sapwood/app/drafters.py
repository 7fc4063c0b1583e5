"""Loads the draft model, and builds the drafter that a rank asks for guesses."""

from __future__ import annotations

from sapwood.app.draft_model import Draft
from sapwood.app.loading import LoadWatch, dense_weight_dtype, fill, linear_scheme, timed
from sapwood.app.resolving import Resolved
from sapwood.executor.drafting import Drafter, DraftMemory, StandaloneDrafter
from sapwood.executor.recorded import record_steps
from sapwood.executor.sampling.sampler import Sampler
from sapwood.layers.build import Build
from sapwood.models.lm.decoder import Decoder
from sapwood.schema.config.resolve import Decision


def load_draft(resolved: Resolved, draft: Draft, watch: LoadWatch) -> Decoder:
    """The draft model with its weights."""
    watch.beat("loading the draft model")
    with timed("draft model's structure"):
        model = Decoder.of(
            draft.shape,
            Build(
                kernels=resolved.kernels.kernels,
                device=resolved.device,
                dtype=resolved.dtype,
                scheme=linear_scheme(draft.config, draft.files),
                embedding_dtype=dense_weight_dtype(draft.config),
            ),
        )
    fill(
        model,
        draft.files,
        draft.config,
        resolved.dtype,
        name_of=model.checkpoint_name,
        watch=watch,
    )
    return model


def build_drafter(
    resolved: Resolved, draft: Draft, model: Decoder, memory: DraftMemory, sampling: Sampler
) -> Drafter:
    """The drafter of a loaded draft model.

    sampling  chooses guesses"""
    choice = record_steps(
        model,
        resolved.kernels.kernels,
        memory.kv_caches,
        group_of_layer=memory.places.group_of_layer,
        enabled=not resolved.config.execution.disable_graphs,
    )
    resolved.decisions.append(
        Decision("draft model's graphs", "on" if choice.is_recorded else "off", choice.why)
    )
    return StandaloneDrafter(
        model,
        choice.steps,
        memory,
        sampling,
        vocab_size=resolved.shape.vocab_size,
        draft_vocab_size=draft.shape.vocab_size,
    )
