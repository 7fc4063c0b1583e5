"""Computes a decoder layer by layer: only one layer is built at a time, and hidden states wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sapwood.convert.tapped import TappedLinear, TappedScheme
from sapwood.executor.cache_inputs import CachePlaces
from sapwood.kernels.attention_batch import AttentionBatch
from sapwood.layers.embedding import VocabEmbedding
from sapwood.layers.forward_batch import CacheInputs, ForwardBatch
from sapwood.layers.layer import Layer
from sapwood.layers.targets import Target, prefixed
from sapwood.memory.buffers import allocate_caches
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.loader.assign import load_weights
from sapwood.schema.cache import CacheKind

LOGIT_ROWS = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """One decoder layer with its weights, and its linear layers in the order of the computation."""

    layer: Layer
    linears: list[TappedLinear]


class Walk:
    """Builds the parts of a decoder from the tensors of its checkpoint, and runs them on windows.

    window  tokens of every window
    """

    def __init__(self, architecture: Architecture, *, window: int, page_size: int) -> None:
        self._architecture = architecture
        self._decoder = architecture.config
        self.device = architecture.build.device
        self.dtype = architecture.build.dtype
        self._batch = _window_batch(architecture, window, page_size)

    @property
    def names(self) -> Names:
        """Names of the model's parts in the checkpoint."""
        return self._architecture.names

    @property
    def num_layers(self) -> int:
        return self._decoder.num_layers

    def embed(self, tensors: Mapping[str, Tensor], windows: Sequence[Tensor]) -> list[Tensor]:
        """Token ids [window] of each -> hidden states [window, hidden]."""
        embedding, positions = self._embedding(tensors), self._architecture.positions()
        norm, names = self._architecture.embedding_norm(), self.names
        vectors = [embedding(window.to(self.device)) for window in windows]
        if positions is not None:
            self._load(prefixed(names.positions, positions.targets()), tensors)
            own = positions(self._batch.positions)
            vectors = [x + own for x in vectors]
        if norm is not None:
            self._load(prefixed(names.embedding_norm, norm.targets()), tensors)
            vectors = [norm(x) for x in vectors]
        return vectors

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> TappedLayer:
        """A decoder layer, built from its tensors by their whole names."""
        scheme = TappedScheme()
        build = replace(self._architecture.build, scheme=scheme)
        layer = self._architecture.rebuilt(build).layer(index)
        targets = prefixed(self.names.layer(index), layer.targets())
        scheme.find_rows(targets, self.device)
        load_weights(_Targets(targets), scheme.following(_wanted(targets, tensors).items()))
        layer.pack()
        return TappedLayer(layer, scheme.linears)

    def steps(self, layer: TappedLayer, hidden: Sequence[Tensor]) -> Iterator[tuple[Tensor, ...]]:
        """The inputs [T, in] that each of `layer.linears` gets from each window, layer by layer;
        then the hidden states after the decoder layer.

        A linear layer computes when the values after its inputs are asked for, so it may be
        converted before that. The given hidden states stay unchanged.
        """
        # The layer adds to what it is given in place.
        runs = (layer.layer.steps(x.clone(), self._batch) for x in hidden)
        return zip(*runs, strict=True)

    def run(self, layer: TappedLayer, hidden: Sequence[Tensor]) -> list[Tensor]:
        """The hidden states of each window after one more layer; the given ones stay unchanged."""
        found = []
        for x in hidden:
            for states in layer.layer.steps(x.clone(), self._batch):
                last = states
            found.append(last)
        return found

    def negative_log_likelihood(
        self, tensors: Mapping[str, Tensor], hidden: Sequence[Tensor], windows: Sequence[Tensor]
    ) -> float:
        """The mean over all tokens but each window's first, in nats.

        hidden  hidden states after all layers
        """
        norm = self._architecture.norm()
        tied = self._architecture.embedding() if self._decoder.tie_word_embeddings else None
        head = self._architecture.head(tied)
        names = self.names
        targets = prefixed(names.norm, norm.targets()) | prefixed(names.head, head.targets())
        if tied is not None:
            targets[f"{names.embedding}.weight"] = head.tied_target()
        self._load(targets, tensors)
        head.pack()
        total, count = 0.0, 0
        for x, window in zip(hidden, windows, strict=True):
            following = window.to(self.device)[1:, None]
            for rows, tokens in zip(
                torch.split(norm(x)[:-1], LOGIT_ROWS),
                torch.split(following, LOGIT_ROWS),
                strict=True,
            ):
                scores = head(rows).log_softmax(dim=-1).gather(1, tokens)
                total -= scores.double().sum().item()
                count += len(tokens)
        return total / count

    def _embedding(self, tensors: Mapping[str, Tensor]) -> VocabEmbedding:
        embedding = self._architecture.embedding()
        self._load(prefixed(self.names.embedding, embedding.targets()), tensors)
        return embedding

    def _load(self, targets: Mapping[str, Target], tensors: Mapping[str, Tensor]) -> None:
        load_weights(_Targets(targets), _wanted(targets, tensors).items())


@dataclass(frozen=True, slots=True)
class _Targets:
    """The targets of a part of a model, for the loader."""

    wanted: Mapping[str, Target]

    def targets(self) -> Mapping[str, Target]:
        return self.wanted

    def ignorable_tensors(self) -> tuple[str, ...]:
        return ()


def _wanted(targets: Mapping[str, Target], tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in targets if name in tensors}


def _window_batch(architecture: Architecture, window: int, page_size: int) -> ForwardBatch:
    """A batch of one request with `window` new tokens; place i has token i. All layers of a
    cache group have the same memory, since only one is computed at a time."""
    decoder, build = architecture.config, architecture.build
    device, dtype = build.device, str(build.dtype).removeprefix("torch.")
    num_pages = -(-window // page_size)
    # A window's mask is the layer's own, and all of its pages stay.
    groups = [group.with_dtypes(kv=dtype, activations=dtype) for group in decoder.cache_groups]
    caches = [
        allocate_caches(
            [replace(group, layers=(0,))],
            [1 if group.kind is CacheKind.STATE else num_pages],
            page_size=page_size,
            device=device,
        )[0]
        for group in groups
    ]
    positions = torch.arange(window, device=device)
    inputs = CacheInputs(
        write_index=positions,
        attention=AttentionBatch(
            page_table=torch.arange(num_pages, dtype=torch.int32, device=device)[None],
            query_start=torch.tensor([0, window], dtype=torch.int32, device=device),
            context_len=torch.tensor([window], dtype=torch.int32, device=device),
            query_lens=(window,),
            context_lens=(window,),
            num_decodes=0,
        ),
        slots=torch.zeros(1, dtype=torch.int64, device=device),
    )
    group_of_layer = CachePlaces(groups).group_of_layer
    switch = decoder.switch_length
    return ForwardBatch(
        token_ids=positions,  # not looked at: layers are given hidden states
        positions=positions if switch is None or window <= switch else positions + switch,
        write_index=inputs.write_index,
        attention=inputs.attention,
        groups=[inputs] * len(groups) if group_of_layer else (),
        group_of_layer=group_of_layer,
        kv_caches=[caches[group] for group in group_of_layer or [0] * decoder.num_layers],
        logits_index=positions,
    )
