"""Computes a decoder layer by layer: only one layer is built at a time, and hidden states wait."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sapwood.convert.tapped import TappedLinear, TappedScheme
from sapwood.distributed.groups import Group
from sapwood.kernels.interface import AttentionBatch, Kernels
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.norm import RMSNorm
from sapwood.layers.rotary import cos_sin_table
from sapwood.layers.targets import Target, prefixed
from sapwood.memory.buffers import allocate_caches
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.decoder import Decoder, DecoderLayer
from sapwood.models.loader.assign import load_weights
from sapwood.schema.cache import keys_and_values

LOGIT_ROWS = 256
"""Tokens whose logits are held at once."""


@dataclass(frozen=True, slots=True)
class TappedLayer:
    """One decoder layer with its weights, and its linear layers in the order of the computation."""

    layer: DecoderLayer
    linears: list[TappedLinear]


class Walk:
    """Builds the parts of a decoder from the tensors of its checkpoint, and runs them on windows.

    window         tokens of every window
    device, dtype  those of the computation
    """

    def __init__(
        self,
        architecture: type[Decoder],
        decoder: DecoderConfig,
        kernels: Kernels,
        *,
        window: int,
        page_size: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self._architecture = architecture
        self._decoder = decoder
        self._kernels = kernels
        self.device = device
        self.dtype = dtype
        self._cos_sin = cos_sin_table(
            decoder.rope,
            head_dim=decoder.head_dim,
            context_length=decoder.context_length,
            device=device,
        )
        self._batch = _window_batch(decoder, window, page_size, device, dtype)

    @property
    def num_layers(self) -> int:
        return self._decoder.num_layers

    def embed(self, tensors: Mapping[str, Tensor], windows: Sequence[Tensor]) -> list[Tensor]:
        """Token ids [window] of each -> hidden states [window, hidden]."""
        embedding = self._embedding(tensors)
        return [embedding(window.to(self.device)) for window in windows]

    def layer(self, index: int, tensors: Mapping[str, Tensor]) -> TappedLayer:
        """A decoder layer, built from its tensors by their whole names."""
        scheme = TappedScheme()
        layer = DecoderLayer(
            0,  # the index of its KV cache, the only cache here
            self._decoder,
            self._architecture.recipe(self._decoder),
            cos_sin=self._cos_sin,
            kernels=self._kernels,
            group=Group(),
            device=self.device,
            dtype=self.dtype,
            scheme=scheme,
        )
        targets = prefixed(layer_prefix(index), layer.targets())
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
            # The layer adds to what it is given in place.
            out, residual = layer.layer(x.clone(), None, self._batch)
            found.append(out + residual)
        return found

    def negative_log_likelihood(
        self, tensors: Mapping[str, Tensor], hidden: Sequence[Tensor], windows: Sequence[Tensor]
    ) -> float:
        """The mean over all tokens but each window's first, in nats.

        hidden  hidden states after all layers
        """
        norm = RMSNorm(
            self._decoder.hidden_size,
            eps=self._decoder.rms_norm_eps,
            kernels=self._kernels,
            device=self.device,
            dtype=self.dtype,
        )
        tied = self._empty_embedding() if self._decoder.tie_word_embeddings else None
        head = LMHead(
            self._decoder.vocab_size,
            self._decoder.hidden_size,
            tied=tied,
            kernels=self._kernels,
            group=Group(),
            device=self.device,
            dtype=self.dtype,
        )
        targets = prefixed("model.norm", norm.targets()) | prefixed("lm_head", head.targets())
        if tied is not None:
            targets["model.embed_tokens.weight"] = head.tied_target()
        load_weights(_Targets(targets), _wanted(targets, tensors).items())
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
        embedding = self._empty_embedding()
        targets = prefixed("model.embed_tokens", embedding.targets())
        load_weights(_Targets(targets), _wanted(targets, tensors).items())
        return embedding

    def _empty_embedding(self) -> VocabEmbedding:
        return VocabEmbedding(
            self._decoder.vocab_size,
            self._decoder.hidden_size,
            kernels=self._kernels,
            group=Group(),
            device=self.device,
            dtype=self.dtype,
        )


def layer_prefix(index: int) -> str:
    return f"model.layers.{index}"


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


def _window_batch(
    decoder: DecoderConfig, window: int, page_size: int, device: torch.device, dtype: torch.dtype
) -> ForwardBatch:
    """A batch of one request with `window` new tokens and KV of one layer; place i has token i."""
    num_pages = -(-window // page_size)
    caches = allocate_caches(
        [
            keys_and_values(
                range(1),
                num_kv_heads=decoder.num_kv_heads,
                head_dim=decoder.head_dim,
                dtype=str(dtype).removeprefix("torch."),
            )
        ],
        [num_pages],
        page_size=page_size,
        device=device,
    )
    positions = torch.arange(window, device=device)
    return ForwardBatch(
        token_ids=positions,  # not looked at: layers are given hidden states
        positions=positions,
        write_index=positions,
        attention=AttentionBatch(
            page_table=torch.arange(num_pages, dtype=torch.int32, device=device)[None],
            query_start=torch.tensor([0, window], dtype=torch.int32, device=device),
            context_len=torch.tensor([window], dtype=torch.int32, device=device),
            query_lens=(window,),
            context_lens=(window,),
            num_decodes=0,
        ),
        kv_caches=caches,
        logits_index=positions,
    )
