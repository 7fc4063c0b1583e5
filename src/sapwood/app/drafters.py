"""Loads the draft model, and builds the drafter that a rank asks for guesses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from sapwood.app.draft_model import Draft, DraftKind
from sapwood.app.loading import LoadWatch, dense_weight_dtype, fill, linear_scheme, timed
from sapwood.app.resolving import Resolved
from sapwood.executor.drafting import Drafter, DraftMemory
from sapwood.executor.guess_trees import TreeLimits
from sapwood.executor.recorded import record_steps
from sapwood.executor.sampling.guess_sampler import GuessSampler
from sapwood.executor.standalone_drafting import StandaloneDrafter
from sapwood.executor.state_drafting import StateDrafter
from sapwood.layers.build import Build
from sapwood.layers.targets import Target
from sapwood.models.drafts.eagle import Eagle3Head, eagle_head
from sapwood.models.drafts.head import CombiningHead, DraftHead
from sapwood.models.lm.decoder import Decoder
from sapwood.models.registry import decoder_class
from sapwood.schema.config.resolve import Decision

MakeDrafter = Callable[[DraftMemory, GuessSampler], Drafter]
"""From where a draft model finds its keys, and what chooses guesses."""


@dataclass(frozen=True, slots=True)
class LoadedDraft:
    """A loaded draft model.

    captures  the layers of the model whose inputs it takes; empty: what comes after the model's
              last norm; None: it takes no states
    """

    make_drafter: MakeDrafter
    captures: tuple[int, ...] | None = None


@dataclass(frozen=True, slots=True)
class WithHead:
    """A model and the layer of its checkpoint that guesses, to be filled together: the files are
    read once."""

    model: Decoder
    head: DraftHead

    def targets(self) -> dict[str, Target]:
        return self.model.targets() | self.head.targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        return self.model.ignorable_tensors()

    def finalize(self) -> None:
        self.model.finalize()
        self.head.finalize()


def own_head(model: Decoder, draft: Draft, build: Build) -> DraftHead:
    """The layer of the model's own checkpoint that predicts further tokens, without weights.

    build  of the model"""
    plain = replace(build, routes=None, adapters=None)
    parts = decoder_class(draft.shape.architecture)(draft.shape, plain).predictor()
    return CombiningHead(parts, model.embedding, model.lm_head, hot_ids=draft.hot_ids)


def load_drafter(
    resolved: Resolved, draft: Draft, model: Decoder | None, watch: LoadWatch
) -> LoadedDraft:
    """Load a draft model that has files of its own.

    model  whose tokens are guessed; None: it is none of sapwood's own, and no head goes with it"""
    watch.beat("loading the draft model")
    build = Build(
        kernels=resolved.kernels.kernels,
        device=resolved.device,
        dtype=resolved.dtype,
        scheme=linear_scheme(draft.config, draft.files),
        embedding_dtype=dense_weight_dtype(draft.config),
    )
    found: Decoder | DraftHead
    with timed("draft model's structure"):
        if draft.kind is DraftKind.MODEL or model is None:
            found = Decoder.of(draft.shape, build)
        elif draft.kind is DraftKind.EAGLE:
            found = eagle_head(
                draft.shape, build, model.embedding, model.lm_head, hot_ids=draft.hot_ids
            )
        else:
            found = Eagle3Head(draft.shape, build, resolved.decoder, model.embedding, model.lm_head)
    name_of, dtype = found.checkpoint_name, resolved.dtype
    fill(found, draft.files, draft.config, dtype, name_of=name_of, watch=watch)
    if isinstance(found, Decoder):
        return LoadedDraft(standalone_drafter(resolved, draft, found))
    assert model is not None
    return head_drafter(resolved, model, found)


def standalone_drafter(resolved: Resolved, draft: Draft, model: Decoder) -> MakeDrafter:
    """Makes the drafter of a loaded language model, and records its steps."""

    def make(memory: DraftMemory, sampling: GuessSampler) -> Drafter:
        choice = record_steps(
            model,
            resolved.kernels.kernels,
            memory.kv_caches,
            group_of_layer=memory.places.group_of_layer,
            enabled=not resolved.config.execution.disable_graphs,
        )
        is_on = "on" if choice.is_recorded else "off"
        resolved.decisions.append(Decision("draft model's graphs", is_on, choice.why))
        return StandaloneDrafter(
            model,
            choice.steps,
            memory,
            sampling,
            vocab_size=resolved.shape.vocab_size,
            draft_vocab_size=draft.shape.vocab_size,
            limits=_tree_limits(resolved),
        )

    return make


def head_drafter(resolved: Resolved, model: Decoder, head: DraftHead) -> LoadedDraft:
    """What guesses with a loaded head, which goes on from the states of `model`."""
    captures = tuple(head.captures)

    def make(memory: DraftMemory, sampling: GuessSampler) -> Drafter:
        width = max(1, len(captures)) * model.config.hidden_size
        return StateDrafter(
            model,
            head,
            memory,
            sampling,
            states_width=width,
            dtype=resolved.dtype,
            limits=_tree_limits(resolved),
        )

    return LoadedDraft(make, captures)


def _tree_limits(resolved: Resolved) -> TreeLimits:
    return TreeLimits(
        breadth=resolved.config.drafting.speculative_eagle_topk,
        most=resolved.config.speculation.speculative_num_draft_tokens - 1,
    )
