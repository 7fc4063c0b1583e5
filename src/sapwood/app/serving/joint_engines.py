"""An engine that shares the feed-forwards of its model with other engines on this machine.

Each of them has requests, a scheduler and a cache of its own (`--enable-dp-attention`)."""

from __future__ import annotations

from pathlib import Path

import torch

from sapwood.app.building.resolving import Resolved
from sapwood.app.ranks.member import RankMember, ranks_of_expert
from sapwood.base.channel import ZmqReceiver, ZmqSender
from sapwood.distributed.groups import Group
from sapwood.distributed.meeting import Meeting
from sapwood.engine.joint_steps import JointSteps
from sapwood.schema.request import EngineEnds, EngineInput, StepBegun


class JointEngines:
    """One engine's connections to the others.

    folder  in which the engines meet; no others use it
    rank    number of this engine
    """

    def __init__(self, folder: Path, rank: int, inbox: ZmqReceiver[EngineInput]) -> None:
        self._folder = folder
        self._rank = rank
        inbox.listen(self._address(rank))

    def member(self, resolved: Resolved) -> RankMember:
        """This engine's membership; waits for the others."""
        parallel = resolved.config.parallel
        meeting = Meeting.in_folder(self._folder, timeout_s=parallel.dist_timeout)
        ranks, device = range(parallel.tp_size), resolved.device

        def group(name: str, device: torch.device) -> Group:
            return meeting.group(name, ranks, self._rank, device, on_one_machine=True)

        tp, counting = group("tp", device), group("counting", torch.device("cpu"))
        expert = None
        if parallel.ep_size > 1:
            alike = ranks_of_expert(parallel, self._rank)
            expert = meeting.group(f"expert-{alike[0]}", alike, self._rank, device)

        def smallest_pool(max_total_tokens: int) -> int:
            return int(counting.all_gather(torch.tensor([[max_total_tokens]])).min())

        return RankMember(
            tp=tp,
            attention=Group(),
            counting=counting,
            expert=expert,
            meeting=meeting,
            smallest_pool=smallest_pool,
        )

    def steps(self, num_engines: int) -> JointSteps:
        """What tells the others of this engine's steps, once all have met."""
        others = [self._address(rank) for rank in range(num_engines) if rank != self._rank]
        senders: list[ZmqSender[EngineInput]] = [
            ZmqSender(address, bind=False) for address in others
        ]

        def tell(message: StepBegun | EngineEnds) -> None:
            for sender in senders:
                sender.send(message)

        return JointSteps(tell, len(others))

    def _address(self, rank: int) -> str:
        return f"ipc://{self._folder}/joint-{rank}"
