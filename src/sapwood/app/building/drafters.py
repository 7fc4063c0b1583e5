"""Loads the draft model, and builds the drafter that a rank asks for guesses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from sapwood.app.building.draft_model import Draft, DraftKind
from sapwood.app.building.loading import LoadWatch, dense_weight_dtype, fill, linear_scheme, timed
from sapwood.app.building.resolving import Resolved
from sapwood.executor.drafting import Drafter, DraftMemory
from sapwood.executor.guess_trees import TreeLimits
from sapwood.executor.layered_drafting import LayeredDrafter
from sapwood.executor.recorded import record_steps
from sapwood.executor.sampling.guess_sampler import GuessSampler
from sapwood.executor.standalone_drafting import StandaloneDrafter
from sapwood.executor.state_drafting import StateDrafter
from sapwood.executor.state_pairs import StatePairs
from sapwood.layers.build import Build
from sapwood.layers.targets import Target
from sapwood.models.drafts.eagle import Eagle3Head, eagle_head
from sapwood.models.drafts.head import CombiningHead, DraftHead
from sapwood.models.lm.decoder import Decoder
from sapwood.models.registry import decoder_class
from sapwood.schema.config.decision import Decision

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
class WithHeads:
    """A model and the layers of its checkpoint that guess, to be filled together: the files are
    read once."""

    model: Decoder
    heads: Sequence[DraftHead]

    def targets(self) -> dict[str, Target]:
        found = self.model.targets()
        for head in self.heads:
            found |= head.targets()
        return found

    def ignorable_tensors(self) -> tuple[str, ...]:
        return self.model.ignorable_tensors()

    def finalize(self) -> None:
        self.model.finalize()
        for head in self.heads:
            head.finalize()


def own_heads(model: Decoder, draft: Draft, build: Build) -> list[DraftHead]:
    """The layers of the model's own checkpoint that predict further tokens, without weights.

    build  of the model"""
    plain = replace(build, routes=None, adapters=None)
    architecture = decoder_class(draft.shape.architecture)(draft.shape, plain)
    parts = architecture.predictors() if draft.has_several else [architecture.predictor()]
    captures = (model.config.num_layers,) if draft.has_several else ()
    return [
        CombiningHead(one, model.embedding, model.lm_head, captures=captures, hot_ids=draft.hot_ids)
        for one in parts
    ]


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
    return head_drafter(resolved, model, [found])


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


def head_drafter(resolved: Resolved, model: Decoder, heads: Sequence[DraftHead]) -> LoadedDraft:
    """What guesses with loaded heads, which go on from the states of `model`: with one head all
    guesses, or one with each."""
    captures = heads[0].captures
    width, dtype = max(1, len(captures)) * model.config.hidden_size, resolved.dtype

    def make(memory: DraftMemory, sampling: GuessSampler) -> Drafter:
        pairs = StatePairs(model, captures, memory, width=width, dtype=dtype)
        if len(heads) > 1:
            return LayeredDrafter(pairs, heads, memory, sampling, width=width, dtype=dtype)
        return StateDrafter(pairs, heads[0], memory, sampling, limits=_tree_limits(resolved))

    return LoadedDraft(make, captures)


def _tree_limits(resolved: Resolved) -> TreeLimits:
    return TreeLimits(
        breadth=resolved.config.drafting.speculative_eagle_topk,
        most=resolved.config.speculation.speculative_num_draft_tokens - 1,
    )
