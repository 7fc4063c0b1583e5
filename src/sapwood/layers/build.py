"""What every layer of a model is built with: kernels, ranks, device, data types."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from sapwood.distributed.groups import Group
from sapwood.kernels.interface import Kernels
from sapwood.layers.adapters import AdapterContext, AdapterSite
from sapwood.layers.expert_exchange import ExpertExchange
from sapwood.layers.expert_slots import MovableExperts
from sapwood.layers.quantization.dense import DENSE
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.renewal import Renewal
from sapwood.layers.routes import RouteLog
from sapwood.layers.shared_rows import SharedRows


@dataclass(frozen=True, slots=True, kw_only=True)
class Groups:
    """The ranks that share each kind of layer.

    tp         share the feed-forward layers
    attention  share the heads of attention and the embedding: they have the same requests
    head       share the output layer, unless it is the embedding too; None: those of attention
    expert     share each expert: neighbours in tp. Other ranks of tp have other experts (expert
               parallelism). None: all of tp share every expert
    """

    tp: Group = field(default_factory=Group)
    attention: Group = field(default_factory=Group)
    expert: Group | None = None
    head: Group | None = None

    @property
    def ep_size(self) -> int:
        """Parts into which the experts are divided."""
        return 1 if self.expert is None else self.tp.size // self.expert.size

    @property
    def ep_rank(self) -> int:
        """Which of these parts this rank has."""
        return 0 if self.expert is None else self.tp.rank // self.expert.size

    @staticmethod
    def tensor_parallel(group: Group, expert: Group | None = None) -> Groups:
        """The same ranks share every layer, but perhaps its experts."""
        return Groups(tp=group, attention=group, expert=expert)


@dataclass(frozen=True, slots=True, kw_only=True)
class Build:
    """The same value for all layers of a model.

    dtype            of activations, norms and biases
    scheme           stores the weights of all linear layers, the output layer's among them
    embedding_dtype  in which the embedding is kept, if narrower than dtype; None: in dtype
    routes           is told which experts the routers choose; None: nobody wants to know
    adapters         tells the layers which adapters a step has; None: there are no adapters
    num_redundant_experts  further copies of experts in each layer of experts, over all ranks
    experts          is told of the layers of experts; None: nobody moves experts
    rows             of ranks that share feed-forwards, but not attention; None: there are none
    renewal          knows which layers are being filled again, while the model computes
    exchange         sends rows to the ranks that have their experts; None: each rank has all rows
    """

    kernels: Kernels
    device: torch.device
    dtype: torch.dtype
    groups: Groups = field(default_factory=Groups)
    scheme: LinearScheme = DENSE
    embedding_dtype: torch.dtype | None = None
    routes: RouteLog | None = None
    adapters: AdapterContext | None = None
    num_redundant_experts: int = 0
    experts: MovableExperts | None = None
    rows: SharedRows | None = None
    renewal: Renewal = field(default_factory=Renewal)
    exchange: ExpertExchange | None = None

    @property
    def beside_experts(self) -> Build:
        """For what goes on beside a mixture's experts with the same rows: not shared by ranks of
        which each has rows of its own there."""
        if self.exchange is None:
            return self
        return replace(self, groups=replace(self.groups, tp=Group()))

    def adapter_site(self, in_size: int, out_size: int) -> AdapterSite | None:
        """Where adapters add to a linear layer of these sizes; None if there are no adapters."""
        if self.adapters is None:
            return None
        return self.adapters.site(self.kernels, in_size, out_size)

    def empty(self, *shape: int) -> torch.Tensor:
        """An uninitialised parameter of the model's dtype."""
        return torch.empty(shape, device=self.device, dtype=self.dtype)
