"""One rank's membership in a model that several ranks share: its groups, and what they agree on."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from sapwood.app.building.loading import LoadWatch
from sapwood.app.building.resolving import Resolved
from sapwood.app.ranks.ranks import RankTeam
from sapwood.distributed.groups import Group
from sapwood.distributed.meeting import Meeting
from sapwood.distributed.pipe import GroupPipe, Pipe
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.parallel import ParallelConfig
from sapwood.schema.output import RankFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMember:
    """A rank as what it builds sees it; by default the only one.

    tp       the ranks that share each layer with this one
    attention  those of them that share attention with this one; None: all of them
    counting  of ranks that do not share attention: tp, to exchange numbers in the host's memory
    expert   those of them that share each expert with this one; None: all of them
    pipe     joins this rank to those of other stages; None: there is one stage
    meeting  where the groups were made
    smallest_pool  from the tokens for which this rank has memory to those for which all have
    """

    rank: int = 0
    tp: Group = field(default_factory=Group)
    attention: Group | None = None
    counting: Group | None = None
    expert: Group | None = None
    pipe: Pipe | None = None
    meeting: Meeting | None = None
    smallest_pool: Callable[[int], int] = int

    @property
    def leads(self) -> bool:
        """Whether the scheduler is in this rank's process: this rank chooses the tokens."""
        return self.rank == 0

    def agreed(self, resolved: Resolved) -> Resolved:
        """The configuration with a KV pool for which every rank has memory."""
        own = resolved.config.memory.max_total_tokens
        smallest = self.smallest_pool(own)
        if smallest == own:
            return resolved
        config = resolved.config
        memory = replace(config.memory, max_total_tokens=smallest)
        kept = [decision for decision in resolved.decisions if decision.option != _POOL]
        kept.append(Decision(_POOL, smallest, f"the smallest over all ranks; this one has {own}"))
        return replace(resolved, config=replace(config, memory=memory), decisions=kept)


ALONE = RankMember()
_POOL = "max_total_tokens"


def lead(team: RankTeam, resolved: Resolved) -> RankMember:
    """Rank 0's membership. Tells all ranks what to run; RankLost if one is not there."""
    parallel = resolved.config.parallel
    meeting, port = Meeting.opened(team.host, timeout_s=parallel.dist_timeout)
    team.start(resolved.config, port)
    member = member_of(0, resolved, meeting, team.smallest_pool)
    team.before_failure(member.tp.stop)
    return member


def member_of(
    rank: int, resolved: Resolved, meeting: Meeting, smallest_pool: Callable[[int], int]
) -> RankMember:
    """A rank's membership; waits for the other ranks of its groups."""
    parallel = resolved.config.parallel
    ranks = tp_ranks(parallel, rank)
    nodes = {one // parallel.ranks_per_node for one in ranks}
    tp = meeting.group(
        f"tp-{ranks[0]}", ranks, rank, resolved.device, on_one_machine=len(nodes) == 1
    )
    expert = None
    if parallel.ep_size > 1:
        alike = ranks_of_expert(parallel, rank)
        expert = meeting.group(f"expert-{alike[0]}", alike, rank, resolved.device)
    return RankMember(
        rank=rank,
        tp=tp,
        expert=expert,
        pipe=_pipe_of(rank, resolved, meeting),
        meeting=meeting,
        smallest_pool=smallest_pool,
    )


def _pipe_of(rank: int, resolved: Resolved, meeting: Meeting) -> Pipe | None:
    """Joins the ranks that have the same part of each layer, one of each stage."""
    parallel = resolved.config.parallel
    if parallel.pp_size == 1:
        return None
    alike = range(rank % parallel.tp_size, parallel.num_ranks, parallel.tp_size)
    ranks = sorted(alike, key=parallel.stage_index)
    group = meeting.group(f"pp-{alike[0]}", ranks, rank, resolved.device)
    assert group.process_group is not None
    return GroupPipe(group.process_group, group.rank, dtype=resolved.dtype, device=resolved.device)


def tp_ranks(parallel: ParallelConfig, rank: int) -> range:
    """The ranks that share each layer with this one."""
    first = rank - rank % parallel.tp_size
    return range(first, first + parallel.tp_size)


def ranks_of_expert(parallel: ParallelConfig, rank: int) -> range:
    """The ranks that have the same experts as this one, each a part of them."""
    size = parallel.tp_size // parallel.ep_size
    first = rank - rank % size
    return range(first, first + size)


def facts_of(rank: int, resolved: Resolved, watch: LoadWatch) -> RankFacts:
    config = resolved.config
    return RankFacts(
        rank=rank,
        stage=resolved.stage.index,
        host=socket.gethostname(),
        pid=os.getpid(),
        device=config.execution.device,
        num_threads=config.execution.num_threads,
        weight_bytes=watch.weight_bytes,
        read_bytes=watch.read_bytes,
        load_s=watch.load_s,
    )
