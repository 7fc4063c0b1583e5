"""What a rank has beside its model if experts are recorded, placed by somebody, or sent rows."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sapwood.app.building.resolving import Resolved
from sapwood.app.ranks.member import RankMember
from sapwood.distributed import deepep
from sapwood.executor.expert_record import ExpertRecord
from sapwood.layers.deepep_exchange import DeepEPExchange
from sapwood.layers.expert_exchange import ExpertExchange, GroupExchange
from sapwood.layers.expert_slots import MovableExperts
from sapwood.schema.config.parallel import DEEPEP, NO_A2A


def expert_record(resolved: Resolved) -> ExpertRecord | None:
    """What notes the experts that tokens choose; None: nobody asked for a record."""
    asked = resolved.config.execution
    if asked.expert_distribution_recorder_mode is None:
        return None
    experts = resolved.decoder.experts
    assert experts is not None, "the option is refused for models without experts"
    size, folder = (
        asked.expert_distribution_recorder_buffer_size,
        asked.expert_distribution_recorder_dir,
    )
    return ExpertRecord(
        asked.expert_distribution_recorder_mode,
        layers=resolved.decoder.expert_layers,
        num_layers=resolved.decoder.num_layers,
        num_experts=experts.num_experts,
        max_steps=None if size == -1 else size,
        folder=Path(tempfile.gettempdir()) / "sapwood-experts" if folder is None else Path(folder),
    )


def place_experts(resolved: Resolved, experts: MovableExperts | None) -> None:
    """Before the weights are loaded: each rank then reads its own."""
    if experts is None or not resolved.placements:
        return
    own = [at for at in resolved.stage.layers if at in resolved.placements]
    for index, layer in zip(own, experts.layers, strict=True):
        layer.slots.place(resolved.placements[index])


def expert_exchange(resolved: Resolved, member: RankMember) -> ExpertExchange | None:
    """What sends rows to the ranks of their experts; None: each rank has all rows."""
    backend = resolved.config.parallel.moe_a2a_backend
    if member.counting is None or backend == NO_A2A:
        return None
    if backend == DEEPEP:
        row_bytes = resolved.decoder.hidden_size * resolved.dtype.itemsize
        buffer = deepep.open_buffer(member.counting, row_bytes=row_bytes)
        return DeepEPExchange(buffer, member.counting.size)
    return GroupExchange(member.tp, member.counting)
