"""Orders about the weights, the memory and the limits of an engine that serves, as messages."""

from __future__ import annotations

import msgspec


class _Order(msgspec.Struct, frozen=True, tag=True, kw_only=True): ...


class UpdateFromDisk(_Order, frozen=True):
    """Load another checkpoint of the same shapes.

    path         a folder, a catalogue name or a hub repository
    load_format  as --load-format; "": as the engine was started
    """

    path: str
    load_format: str = ""


class UpdateFromTensors(_Order, frozen=True):
    """Take tensors that come with the order, one entry per rank or one for all.

    form  safetensors; pickle: of a list of (name, tensor), or of a dict; flattened_bucket: of a
          dict with `flattened_tensor` and its `metadata`
    """

    parts: list[bytes]
    form: str


class JoinUpdateGroup(_Order, frozen=True):
    """Join a group of processes whose rank 0 will send weights.

    rank  this engine's in the group, of `world_size`"""

    group_name: str
    master_address: str
    master_port: int
    rank: int
    world_size: int
    backend: str


class UpdateFromGroup(_Order, frozen=True):
    """Take tensors that rank 0 of the group broadcasts, in this order.

    is_flattened  whether they come as one tensor of bytes"""

    group_name: str
    names: list[str]
    dtypes: list[str]
    shapes: list[list[int]]
    is_flattened: bool = False


class LeaveUpdateGroup(_Order, frozen=True):
    group_name: str


class ReadWeight(_Order, frozen=True):
    """Answered with JSON: the first `most` entries of each dimension that the tensor is cut to."""

    name: str
    most: int


class CheckWeights(_Order, frozen=True):
    """action  snapshot; reset_tensors: random weights; compare: with the snapshot"""

    action: str


class ReleaseMemory(_Order, frozen=True):
    """Give memory back to the system. tags: kv_cache, weights, cuda_graph; empty: all of them"""

    tags: list[str]


class ResumeMemory(_Order, frozen=True):
    tags: list[str]


class SetLimits(_Order, frozen=True):
    """Limits of the scheduler that hold from now on, as the options of their names; None: as it is.
    Carried out at once."""

    max_queued_requests: int | None = None
    pp_max_micro_batch_size: int | None = None


WeightOrder = (
    UpdateFromDisk
    | UpdateFromTensors
    | JoinUpdateGroup
    | UpdateFromGroup
    | LeaveUpdateGroup
    | ReadWeight
    | CheckWeights
    | ReleaseMemory
    | ResumeMemory
    | SetLimits
)
UPDATES = (UpdateFromDisk, UpdateFromTensors, UpdateFromGroup)
"""Orders that change weights: what was computed with the old ones is stale afterwards."""
WAITING = (*UPDATES, ReleaseMemory, CheckWeights)
"""Orders that must not happen beside a step, nor between the steps of a request that is not
paused."""

PAUSE_MODES = ("abort", "retract", "in_place")
MEMORY_TAGS = ("kv_cache", "weights", "cuda_graph")
