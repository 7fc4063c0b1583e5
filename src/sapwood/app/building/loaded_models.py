"""Loads a model, and its draft model: weights on this rank, packed for the kernels."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from sapwood.app.building.draft_model import DraftKind
from sapwood.app.building.drafters import (
    LoadedDraft,
    WithHeads,
    head_drafter,
    load_drafter,
    own_heads,
)
from sapwood.app.building.loading import (
    LoadWatch,
    Packable,
    dense_weight_dtype,
    fill,
    linear_scheme,
    timed,
)
from sapwood.app.building.model_impl import SLOW
from sapwood.app.building.resolving import Resolved
from sapwood.app.building.towers import load_tower
from sapwood.app.ranks.expert_parts import expert_exchange, place_experts
from sapwood.app.ranks.member import ALONE, RankMember
from sapwood.executor.runner import DecoderModel
from sapwood.layers.adapters import AdapterContext
from sapwood.layers.build import Build, Groups
from sapwood.layers.expert_slots import MovableExperts
from sapwood.layers.routes import RouteLog
from sapwood.layers.shared_rows import SharedRows
from sapwood.models.foreign.decoder import ForeignDecoder
from sapwood.models.foreign.structure import ForeignConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.vision.interface import Tower

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Models:
    """A model, its draft model, and what sees for it; None: it has none.

    fillable  the model, with the heads that its checkpoint has, as it can be filled again; None: it
              cannot be
    """

    model: DecoderModel
    draft: LoadedDraft | None = None
    fillable: Packable | None = None
    tower: Tower | None = None


def load_model(resolved: Resolved, *, watch: LoadWatch | None = None) -> DecoderModel:
    """The model with its weights, packed for the kernels; the log says how long each step took."""
    return load_models(replace(resolved, draft=None), watch=watch or LoadWatch()).model


def load_models(
    resolved: Resolved,
    *,
    watch: LoadWatch,
    routes: RouteLog | None = None,
    adapters: AdapterContext | None = None,
    experts: MovableExperts | None = None,
    member: RankMember = ALONE,
) -> Models:
    """The model and its draft model, as `load_model`.

    routes    is told which experts the model chooses; None: nobody wants to know
    adapters  as in Build
    experts   as in Build
    """
    config, files, draft = resolved.config, resolved.files, resolved.draft
    if isinstance(resolved.shape, ForeignConfig):
        foreign = _load_foreign(resolved, resolved.shape, watch)
        if draft is None:
            return Models(foreign)
        return Models(foreign, load_drafter(resolved, draft, None, watch))
    build = replace(build_of(resolved, member), routes=routes, adapters=adapters, experts=experts)
    with timed("model structure"):
        model = Decoder.of(resolved.decoder, build, resolved.stage, member.pipe)
        place_experts(resolved, experts)
    name_of = model.checkpoint_name
    if draft is not None and draft.kind is DraftKind.OWN:
        heads = own_heads(model, draft, build)
        both = WithHeads(model, heads)
        fill(both, files, config, resolved.dtype, name_of=name_of, watch=watch)
        return Models(model, head_drafter(resolved, model, heads), both)
    fill(
        model,
        files,
        config,
        resolved.dtype,
        name_of=name_of,
        wanted=lambda name: not model.is_elsewhere(name),
        watch=watch,
    )
    tower = load_tower(resolved, build, watch)
    if draft is None:
        # A checkpoint with a tower has tensors that the model alone does not know.
        return Models(model, None, model if tower is None else None, tower)
    return Models(model, load_drafter(resolved, draft, model, watch), model)


def _load_foreign(resolved: Resolved, shape: ForeignConfig, watch: LoadWatch) -> DecoderModel:
    log.warning("%s: %s", shape.architecture, SLOW)
    watch.beat("loading the weights with transformers")
    with timed("weights (transformers)"), watch.filling():
        return ForeignDecoder.load(
            resolved.files.path,
            shape,
            resolved.kernels.kernels,
            device=resolved.device,
            dtype=resolved.dtype,
            is_random=resolved.config.model.load_format == "dummy",
        )


def build_of(resolved: Resolved, member: RankMember) -> Build:
    """What the layers of this rank are built with."""
    return Build(
        kernels=resolved.kernels.kernels,
        device=resolved.device,
        dtype=resolved.dtype,
        groups=_groups(resolved, member),
        scheme=linear_scheme(resolved.config, resolved.files),
        embedding_dtype=dense_weight_dtype(resolved.config),
        num_redundant_experts=resolved.config.parallel.ep_num_redundant_experts,
        rows=None
        if member.counting is None
        else SharedRows(
            member.tp,
            member.counting,
            width=resolved.decoder.hidden_size,
            dtype=resolved.dtype,
            device=resolved.device,
        ),
        exchange=expert_exchange(resolved, member),
    )


def _groups(resolved: Resolved, member: RankMember) -> Groups:
    if member.attention is None:
        return Groups.tensor_parallel(member.tp, member.expert)
    is_whole = resolved.config.parallel.enable_dp_lm_head
    head = member.attention if is_whole else member.tp
    return Groups(tp=member.tp, attention=member.attention, expert=member.expert, head=head)
