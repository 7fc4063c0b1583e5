"""An adapter: what it adds to each layer of a model, on this rank."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.kernels.large_pages import LARGE_PAGE_BYTES, WeightMemory
from sapwood.kernels.low_rank import LowRank
from sapwood.layers.adapted_vocab import VocabTarget
from sapwood.layers.adapters import AdapterSite, AdapterTarget, Addition, Site
from sapwood.layers.targets import FusedIn, Target
from sapwood.lora.config import AdapterConfig
from sapwood.lora.tensors import Pairs, sorted_tensors


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Adapter:
    """additions  on the host, by where they belong
    num_bytes  that they take
    rank       the largest of a layer
    is_covered  whether a recorded step has all of the additions
    invocation  token ids: the adapter adds from the last place on where a prompt has them; empty:
                it adds to all tokens
    content    a digest of its tensors and its configuration; "": nobody has asked for one
    """

    additions: Mapping[Site, Addition]
    num_bytes: int
    rank: int
    is_covered: bool
    invocation: tuple[int, ...] = ()
    content: str = ""


def nowhere_else(name: str) -> bool:
    """Of a model that is one stage: no layer is elsewhere."""
    del name
    return False


FusedAdapter = tuple[FusedIn, AdapterTarget]
"""Where a layer of an expert is in a fused tensor, and how its adapters lie in a site."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AdaptableModel:
    """What a model says about adapters.

    targets  of the linear layers that can have adapters, by their paths in the checkpoint
    vocab    the same of the embedding and the output layer
    fused    of the experts whose layers a checkpoint may have as one tensor, by the tensor's path
    name_of  from a tensor's name in a checkpoint to the name in the model
    dtype    of activations, and so of additions
    is_elsewhere  whether another stage has the layer with the tensor of that name in the model
    """

    targets: Mapping[str, AdapterTarget]
    vocab: Mapping[str, VocabTarget]
    fused: Mapping[str, Sequence[FusedAdapter]]
    name_of: Callable[[str], str]
    dtype: torch.dtype
    is_elsewhere: Callable[[str], bool] = nowhere_else


def adaptable(
    targets: Mapping[str, Target],
    name_of: Callable[[str], str],
    dtype: torch.dtype,
    *,
    is_elsewhere: Callable[[str], bool] = nowhere_else,
) -> AdaptableModel:
    """What a model says by the targets of its tensors; without adapters there are no sites."""
    found: dict[str, AdapterTarget] = {}
    vocab: dict[str, VocabTarget] = {}
    fused: dict[str, list[FusedAdapter]] = defaultdict(list)
    for name, target in targets.items():
        if target.vocab_adapter is not None:
            vocab[name.removesuffix(".weight")] = target.vocab_adapter
        if target.adapter is None:
            continue
        found[name.removesuffix(".weight")] = target.adapter
        if target.fused_in is not None:
            fused[target.fused_in.name].append((target.fused_in, target.adapter))
    return AdaptableModel(
        targets=found,
        vocab=vocab,
        fused=fused,
        name_of=name_of,
        is_elsewhere=is_elsewhere,
        dtype=dtype,
    )


def build_adapter(
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    model: AdaptableModel,
    *,
    source: str,
    max_rank: int,
    modules: frozenset[str] | None = None,
) -> Adapter:
    """The adapter of these tensors, whose names are PEFT's.

    source    names the adapter in errors
    max_rank  the largest rank that the server takes
    modules   last parts of the paths of layers that may have adapters; None: any
    Raises    ConfigError for a tensor that belongs to no layer, or does not fit its layer
    """
    found = sorted_tensors(tensors, source)
    if config.alora_invocation_tokens and (found.embeddings or found.wholes):
        path = next(iter([*found.embeddings, *found.wholes]))
        raise ConfigError(
            f"{source} has alora_invocation_tokens and an adapter of {path}; only linear layers "
            "can be activated in the middle of a text: train the adapter without the other"
        )
    builder = _Builder(config, model, source=source, max_rank=max_rank, modules=modules)
    builder.add_linear(found.linear)
    builder.add_embeddings(found.embeddings)
    builder.add_wholes(found.wholes)
    additions = builder.additions()
    return Adapter(
        additions=additions,
        num_bytes=sum(addition.num_bytes for addition in additions.values()),
        rank=builder.rank,
        is_covered=all(site.is_recorded for site in additions),
        invocation=tuple(config.alora_invocation_tokens or ()),
    )


class _Builder:
    """Finds the places of an adapter's tensors in a model; `rank` is the largest so far."""

    def __init__(
        self,
        config: AdapterConfig,
        model: AdaptableModel,
        *,
        source: str,
        max_rank: int,
        modules: frozenset[str] | None,
    ) -> None:
        self.rank = 0
        self._config, self._model = config, model
        self._source, self._max_rank, self._modules = source, max_rank, modules
        self._parts: dict[AdapterSite, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)
        self._others: dict[Site, Addition] = {}

    def additions(self) -> dict[Site, Addition]:
        dtype = self._model.dtype
        low_rank: dict[Site, LowRank] = {
            site: LowRank.of(found, dtype) for site, found in self._parts.items()
        }
        return _in_large_pages(low_rank) | self._others

    def add_linear(self, pairs: Pairs) -> None:
        model, source = self._model, self._source
        for path, (a, b) in pairs.items():
            if self._is_elsewhere(path):
                continue
            name = self._name(path)
            target = model.targets.get(name)
            experts = None if target is not None else _experts(name, a, b, model)
            if experts is not None:
                self._take_experts(*experts, a, b)
                continue
            if target is None:
                raise ConfigError(
                    f"{source} has an adapter of {path}, but the model has no such linear layer, "
                    "or none that adapters are served for; train the adapter without"
                )
            self._check_module(path)
            self._check_rank(a.shape[0], path)
            target.check(path, a, b, source)
            scaled = b.float() * self._config.scaling(path, a.shape[0])
            self._parts[target.site].append(target.part(a, scaled))

    def add_embeddings(self, pairs: Pairs) -> None:
        for path, (a, b) in pairs.items():
            if self._is_elsewhere(path):
                continue
            target = self._model.vocab.get(self._name(path))
            if target is None or target.low_rank is None:
                raise ConfigError(
                    f"{self._source} has an adapter of the embedding {path}, but the model has no "
                    "such embedding"
                )
            self._check_module(path)
            self._check_rank(a.shape[0], path)
            self._check_vocab(path, (a.shape[1], b.shape[0]), target)
            scaled = b.float() * self._config.scaling(path, a.shape[0])
            self._others[target.site] = target.low_rank(a, scaled)

    def add_wholes(self, wholes: Mapping[str, Tensor]) -> None:
        for path, weight in wholes.items():
            if self._is_elsewhere(path):
                continue
            target = self._model.vocab.get(self._name(path))
            if target is None:
                raise ConfigError(
                    f"{self._source} has a whole weight of {path}; of modules_to_save only the "
                    "embedding and the output layer are served: merge the adapter into its base"
                )
            self._check_module(path)
            self._check_vocab(path, (weight.shape[0], weight.shape[1]), target)
            self._others[target.site] = target.whole(weight)

    def _name(self, path: str) -> str:
        return self._model.name_of(f"{path}.weight").removesuffix(".weight")

    def _is_elsewhere(self, path: str) -> bool:
        """Whether another stage has that layer, and so checks what the adapter has for it."""
        return self._model.is_elsewhere(self._model.name_of(f"{path}.weight"))

    def _check_module(self, path: str) -> None:
        if self._modules is not None and path.rpartition(".")[2] not in self._modules:
            raise ConfigError(
                f"{self._source} has an adapter of {path}, which --lora-target-modules leaves "
                "out; start the server with that module, or with all"
            )

    def _check_vocab(self, path: str, shape: tuple[int, int], target: VocabTarget) -> None:
        if shape != target.shape:
            raise ConfigError(
                f"{self._source} has {shape[0]} tokens of size {shape[1]} at {path}, but the model "
                f"has {target.shape[0]} of {target.shape[1]}; an adapter that adds tokens is not "
                "served: merge it into its base"
            )

    def _check_rank(self, rank: int, path: str) -> None:
        if rank > self._max_rank:
            raise ConfigError(
                f"{self._source} has rank {rank} at {path}, more than --max-lora-rank "
                f"{self._max_rank}"
            )
        self.rank = max(self.rank, rank)

    def _take_experts(
        self, path: str, experts: Sequence[FusedAdapter], a: Tensor, b: Tensor
    ) -> None:
        """Add the parts of all experts' layers.

        a  [experts * rank, in]: expert after expert; b [out, rank * experts]: rank after rank
        """
        num_experts = experts[0][0].num_experts
        if a.shape[0] % num_experts:
            raise ConfigError(
                f"{self._source} has {a.shape[0]} ranks at {path} for {num_experts} experts"
            )
        rank = a.shape[0] // num_experts
        self._check_rank(rank, path)
        of_expert = a.view(num_experts, rank, -1)
        scaled = (b.float() * self._config.scaling(path, rank)).view(b.shape[0], rank, num_experts)
        for fused, target in experts:
            outputs, size = scaled[:, :, fused.expert], target.shape[0]
            own = (
                outputs[fused.part :: fused.num_parts]
                if fused.takes_turns
                else outputs[fused.part * size : (fused.part + 1) * size]
            )
            self._parts[target.site].append(target.part(of_expert[fused.expert], own))


def _in_large_pages(additions: dict[Site, LowRank]) -> dict[Site, Addition]:
    """The same numbers, those of a large adapter together in large pages: a step reads them all,
    and from these faster."""
    if sum(addition.num_bytes for addition in additions.values()) < 2 * LARGE_PAGE_BYTES:
        return dict(additions)
    memory = WeightMemory()

    def copy(numbers: Tensor) -> Tensor:
        return memory.empty(tuple(numbers.shape), numbers.dtype).copy_(numbers)

    return {site: addition.kept_as(copy) for site, addition in additions.items()}


def _experts(
    name: str, a: Tensor, b: Tensor, model: AdaptableModel
) -> tuple[str, Sequence[FusedAdapter]] | None:
    """The fused tensor that PEFT's target_parameters adapt at this path, and its experts; None:
    there is none that fits.

    PEFT names the module, not the tensor: an adapter of a second tensor of the same module is at
    `<path>.base_layer`. The sizes tell which is which."""
    module = name
    while module.endswith(".base_layer"):
        module = module.removesuffix(".base_layer")
    for path, experts in model.fused.items():
        if path.rpartition(".")[0] != module:
            continue
        fused, target = experts[0]
        outputs, inputs = target.shape
        if (a.shape[1], b.shape[0]) == (inputs, outputs * fused.num_parts):
            return path, experts
    return None
