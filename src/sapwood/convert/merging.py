"""An adapter merged into its base: a checkpoint whose weights have the adapter's additions."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sapwood.base.errors import ConfigError
from sapwood.convert.writer import ShardWriter, copy_side_files, write_json
from sapwood.kernels.low_rank import LowRank
from sapwood.kernels.torch_ops import TorchKernels
from sapwood.layers.adapted_vocab import EmbeddingAddition, VocabTarget
from sapwood.layers.adapters import AdapterContext, AdapterSite, AdapterTarget, Addition
from sapwood.layers.build import Build
from sapwood.lora.adapter import AdaptableModel, adaptable, build_adapter
from sapwood.lora.config import AdapterConfig
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader.fused_experts import FusedExperts
from sapwood.models.loader.weights import iterate_weights
from sapwood.store import ModelFiles, Progress
from sapwood.store.progress import stage

MAX_SHARD_BYTES = 5 * 10**9
WEIGHT = ".weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Merged:
    """num_layers  layers that the adapter changed
    num_bytes      of the tensors that were written
    is_untied      whether the output layer has a weight of its own now, because the adapter changed
                   it or the embedding
    """

    num_layers: int
    num_bytes: int
    is_untied: bool


def merge(
    files: ModelFiles,
    hf_config: Mapping[str, Any],
    decoder: DecoderConfig,
    tensors: Mapping[str, Tensor],
    config: AdapterConfig,
    directory: Path,
    *,
    source: str,
    stored_dtype: torch.dtype,
    progress: Progress,
) -> Merged:
    """Write the merged model into an existing, empty directory.

    hf_config        the contents of the model's config.json, which is not quantised
    tensors, config  the adapter's
    source           names the adapter in errors
    stored_dtype     of the tensors that are written; sums are taken in fp32
    Raises           ConfigError if the adapter does not fit the model, and WeightError for a
                     damaged checkpoint
    """
    if config.alora_invocation_tokens:
        raise ConfigError(
            f"{source} has alora_invocation_tokens: it adds to some tokens only, which a merged "
            "weight cannot; serve it with --lora-paths"
        )
    build = Build(
        kernels=TorchKernels(),
        device=torch.device("meta"),  # shapes without memory
        dtype=torch.float32,
        adapters=AdapterContext(),
    )
    model = Decoder.of(decoder, build)
    targets = model.targets()
    additions = _Additions(adaptable(model.adapter_targets(), model.checkpoint_name, build.dtype))
    changes = additions.of(tensors, config, source)
    names = model.tensor_names
    embedding, head = f"{names.embedding}{WEIGHT}", f"{names.head}{WEIGHT}"
    is_untied = decoder.tie_word_embeddings and not changes.keys().isdisjoint({embedding, head})
    writer = ShardWriter(directory, MAX_SHARD_BYTES)
    missing = set(changes)

    def write(name: str, weight: Tensor, *, has_rows: bool) -> None:
        change = changes.get(name)
        if change is not None:
            missing.discard(name)
            weight = change.applied(weight, is_transposed=not has_rows)
        writer.add(name, weight.to(stored_dtype))

    stored = iterate_weights(files, dtype=torch.float32)
    named = ((model.checkpoint_name(name), tensor) for name, tensor in stored)
    num_bytes = sum(path.stat().st_size for path in files.weights)
    with stage(progress, f"merging {source} into {files.name}", num_bytes):
        for name, tensor in FusedExperts(targets).split(named):
            assert isinstance(tensor, Tensor)
            progress.advance(tensor.nbytes // 2)
            if decoder.tie_word_embeddings and name == head:
                continue  # the embedding, once more
            target = targets.get(name)
            if name == embedding and is_untied:
                write(head, tensor.clone(), has_rows=True)
            write(name, tensor, has_rows=target is None or target.has_rows)
    if missing:
        raise ConfigError(
            f"{files.name} has no tensors of {', '.join(sorted(missing)[:5])}, which {source} "
            "changes; give the model that the adapter was trained for"
        )
    writer.finish()
    dtype = str(stored_dtype).removeprefix("torch.")
    own = {name: value for name, value in hf_config.items() if name != "torch_dtype"}
    tied = {"tie_word_embeddings": False} if is_untied else {}
    write_json(directory / "config.json", {**own, **tied, "dtype": dtype})
    copy_side_files(files.path, directory)
    return Merged(num_layers=len(changes), num_bytes=writer.num_bytes, is_untied=is_untied)


@dataclass(frozen=True, slots=True)
class _Change:
    """What an adapter does to one weight: an addition, or a whole weight in its place."""

    addition: Addition

    def applied(self, weight: Tensor, *, is_transposed: bool) -> Tensor:
        match self.addition:
            case LowRank(a=a, parts=(part,)):
                delta = (part.b.t() @ a) if not is_transposed else (a.t() @ part.b)
            case EmbeddingAddition(table=table, b=None):
                return table
            case EmbeddingAddition(table=table, b=Tensor() as b):
                delta = table @ b
            case other:
                raise AssertionError(f"a {type(other).__name__} is no change of a weight")
        return weight + delta


class _Additions:
    """A model's targets in which every tensor of the checkpoint has a site of its own, so that an
    adapter's additions come out tensor by tensor."""

    def __init__(self, model: AdaptableModel) -> None:
        context, kernels = AdapterContext(), TorchKernels()
        self._name_of: dict[object, str] = {}

        def apart(path: str, target: AdapterTarget) -> AdapterTarget:
            outputs, inputs = target.shape
            site = AdapterSite(context, kernels, inputs, outputs)
            self._name_of[site] = f"{path}{WEIGHT}"
            return AdapterTarget(site=site, shape=target.shape)

        targets = {path: apart(path, target) for path, target in model.targets.items()}
        own = {id(target): targets[path] for path, target in model.targets.items()}
        fused = {
            path: [(where, own[id(target)]) for where, target in experts]
            for path, experts in model.fused.items()
        }
        self._model = AdaptableModel(
            targets=targets,
            vocab={path: self._vocab(path, target) for path, target in model.vocab.items()},
            fused=fused,
            name_of=model.name_of,
            dtype=torch.float32,
        )

    def _vocab(self, path: str, target: VocabTarget) -> VocabTarget:
        rows, size = target.shape
        site = AdapterSite(AdapterContext(), TorchKernels(), size, rows)
        self._name_of[site] = f"{path}{WEIGHT}"

        def low_rank(a: Tensor, b: Tensor) -> EmbeddingAddition:
            return EmbeddingAddition(table=a.float().t(), b=b.t())

        def whole(weight: Tensor) -> EmbeddingAddition:
            return EmbeddingAddition(table=weight.float(), b=None)

        return VocabTarget(
            site=site,
            shape=target.shape,
            whole=whole,
            low_rank=low_rank if target.low_rank is not None else None,
        )

    def of(
        self, tensors: Mapping[str, Tensor], config: AdapterConfig, source: str
    ) -> dict[str, _Change]:
        """What the adapter does to each tensor of the checkpoint, by the tensor's name."""
        rank = max((tensor.shape[0] for tensor in tensors.values() if tensor.ndim), default=0)
        adapter = build_adapter(tensors, config, self._model, source=source, max_rank=rank)
        return {self._name_of[site]: _Change(found) for site, found in adapter.additions.items()}
