"""What a rank has beside its model if experts are recorded, or lie where somebody placed them."""

from __future__ import annotations

import tempfile
from pathlib import Path

from sapwood.app.resolving import Resolved
from sapwood.executor.expert_record import ExpertRecord
from sapwood.layers.expert_slots import MovableExperts


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
