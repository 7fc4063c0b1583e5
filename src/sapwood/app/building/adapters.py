"""Builds what loads LoRA adapters on this rank, while the engine serves."""

from __future__ import annotations

import logging
import queue
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sapwood.app.building.loading import timed
from sapwood.base.errors import StartupError
from sapwood.engine.adapters import AdapterSlots
from sapwood.executor.captured import StepsWithAdapters
from sapwood.executor.captured_memory import CapturePlan
from sapwood.kernels.interface import Kernels
from sapwood.kernels.low_rank import AdapterRoom
from sapwood.layers.adapters import AdapterContext, AdapterSite
from sapwood.lora.adapter import AdaptableModel, Adapter, build_adapter
from sapwood.lora.config import parse_config, read_config
from sapwood.lora.pool import AdapterPool
from sapwood.lora.tensors import content_of, parse_tensors, read_tensors
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.lora import LoraConfig
from sapwood.schema.rank import Loaded
from sapwood.schema.request import LoadAdapter, SentAdapter

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class AdapterParts:
    """The parts of an engine that have LoRA adapters.

    pool    of this rank
    slots   which the scheduler gives to adapters, if it is in this rank's process
    loader  reads adapters in a thread of its own
    """

    pool: AdapterPool
    slots: AdapterSlots
    loader: AdapterLoader


class AdapterLoader:
    """Reads and checks adapters in a thread, one after the other: steps go on meanwhile."""

    def __init__(
        self,
        pool: AdapterPool,
        model: AdaptableModel,
        *,
        max_rank: int,
        modules: frozenset[str] | None,
        find: Callable[[str], Path],
    ) -> None:
        """`find` gives the folder that a path, a catalogue name or a hub repository names."""
        self._pool = pool
        self._find = find
        self._model = model
        self.max_rank = max_rank
        self._modules = modules
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="adapters")
        self._finished: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        self._tell: Callable[[Loaded], None] = self._finished.put

    def tell(self, hear: Callable[[Loaded], None]) -> None:
        """From now on `hear` is called from the loader's thread when a load has ended; `finished`
        has nothing more."""
        self._tell = hear

    def most_parts(self) -> Counter[AdapterSite]:
        """Parts that an addition can have, by the sites that captured steps have."""
        sites = (target.site for target in self._model.targets.values())
        return Counter(site for site in sites if site.is_recorded)

    def read(self, adapter_id: str, path: str, sent: SentAdapter | None = None) -> Adapter:
        """Read an adapter now and keep it. ConfigError if it cannot be served."""
        if sent is None:
            folder = self._find(path)
            tensors, config = read_tensors(folder), read_config(folder)
        else:
            tensors = parse_tensors(sent.tensors, path, is_pickled=sent.is_pickled)
            config = parse_config(sent.config, path)
        adapter = build_adapter(
            tensors,
            config,
            self._model,
            source=path,
            max_rank=self.max_rank,
            modules=self._modules,
        )
        adapter = replace(adapter, content=content_of(tensors, config))
        self._pool.add(adapter_id, adapter)
        return adapter

    # ---- engine.adapters.AdapterRanks ----------------------------------------------------------

    def load(self, order: LoadAdapter) -> None:
        self._thread.submit(self._load, order)

    def finished(self) -> list[Loaded]:
        found: list[Loaded] = []
        while not self._finished.empty():
            found.append(self._finished.get())
        return found

    def arrived(self) -> list[str]:
        return self._pool.arrived()

    def unload(self, adapter_id: str) -> None:
        self._pool.remove(adapter_id)

    def close(self) -> None:
        self._thread.shutdown(cancel_futures=True)
        self._pool.close()

    @torch.inference_mode()
    def _load(self, order: LoadAdapter) -> None:
        call_id, adapter_id = order.call_id, order.adapter_id
        done = Loaded(call_id=call_id, adapter_id=adapter_id)
        try:
            adapter = self.read(adapter_id, order.path, order.sent)
            done = Loaded(
                call_id=call_id,
                adapter_id=adapter_id,
                num_bytes=adapter.num_bytes,
                invocation=adapter.invocation,
                content=adapter.content,
            )
        except StartupError as error:
            done = Loaded(call_id=call_id, adapter_id=adapter_id, failure=error.message)
        except Exception as error:
            log.exception("loading the adapter in %s failed", order.path)
            why = f"loading the adapter failed: {type(error).__name__}: {error}"
            done = Loaded(call_id=call_id, adapter_id=adapter_id, failure=why)
        finally:
            self._tell(done)


def build_adapters(
    config: LoraConfig,
    model: AdaptableModel,
    context: AdapterContext,
    device: torch.device,
    find: Callable[[str], Path],
) -> tuple[AdapterParts, Decision]:
    """The parts, with the adapters of --lora-paths loaded under their names.

    context  of the model's layers
    find     as in AdapterLoader
    Raises   ModelSourceError for an adapter that is nowhere, and ConfigError if one cannot be
             served
    """
    max_rank, why = config.max_lora_rank, "as asked"
    if max_rank is None:
        ranks = [read_config(find(path.path)).max_rank for path in config.paths]
        max_rank, why = max(ranks), "the largest rank among --lora-paths"
    overlaps = config.enable_lora_overlap_loading
    pool = AdapterPool(device, context, overlaps=overlaps)
    loader = AdapterLoader(pool, model, max_rank=max_rank, modules=config.modules, find=find)
    max_bytes = config.max_loras_per_batch * largest_bytes(model, max_rank, config.modules)
    found: dict[str, Adapter] = {}
    for path in config.paths:
        with timed(f"the adapter {path.name}"):
            found[path.name] = loader.read(path.name, path.path)
    # Those with whole weights are larger than ranks tell.
    sizes = sorted((adapter.num_bytes for adapter in found.values()), reverse=True)
    most_at_once = sizes[: config.max_loras_per_batch]
    slots = AdapterSlots(
        config.max_loras_per_batch,
        max(max_bytes, sum(most_at_once)),
        policy="fifo" if config.lora_eviction_policy == "fifo" else "lru",
        overlaps=overlaps,
    )
    for name, adapter in found.items():
        refused = slots.add(name, adapter.num_bytes, adapter.invocation, adapter.content)
        assert refused is None, "each of these adapters fits"
    parts = AdapterParts(pool, slots, loader)
    return parts, Decision("max_lora_rank", max_rank, why)


def steps_with_adapters(
    parts: AdapterParts, kernels: Kernels, plan: CapturePlan
) -> StepsWithAdapters | None:
    """What a device captures steps with adapters with; None if the kernels cannot do that."""
    room = AdapterRoom(
        num_rows=plan.most_tokens,
        num_slots=parts.slots.max_slots,
        max_rank=parts.loader.max_rank,
    )
    fixed = kernels.captured_adapters(room, plan.dtype, plan.device)
    if fixed is None:
        return None
    for site, most_parts in parts.loader.most_parts().items():
        fixed.cover(site.layer, most_parts)
    return StepsWithAdapters(parts.pool.context, fixed)


def largest_bytes(model: AdaptableModel, max_rank: int, modules: frozenset[str] | None) -> int:
    """Bytes of an adapter of that rank on all layers that may have one, without whole weights."""
    shapes = [(path, target.shape) for path, target in model.targets.items()]
    shapes += [(path, target.shape) for path, target in model.vocab.items() if target.low_rank]
    sizes = [
        sum(shape)
        for path, shape in shapes
        if modules is None or path.rpartition(".")[2] in modules
    ]
    return max_rank * sum(sizes) * model.dtype.itemsize
