"""A draft head: layers that guess the next token from a model's hidden states.

The head pairs the state of each token with the embedding of the token that follows it, and so
guesses the token after that. Its own outcome takes the place of the model's state for the next
guess. The embedding, and as a rule the output layer, are the model's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sapwood.distributed.groups import Group
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import Layer, NamedNorm, summed
from sapwood.layers.linear import RowParallelLinear
from sapwood.layers.targets import Target, once_filled, prefixed


class DraftHead(Protocol):
    """A head to be filled like a Decoder, then used under torch.inference_mode().

    captures  the model's layers whose inputs are its states; the number of layers stands for what
              the last norm takes; empty: the state is the model's own after its last norm
    """

    @property
    def captures(self) -> tuple[int, ...]: ...

    def taken(self, states: Tensor) -> Tensor:
        """states [T, hidden of all captures], of the model -> what `forward` takes"""
        ...

    def forward(self, batch: ForwardBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        """(what `logits` takes, states for the next guesses), both [T, hidden].

        batch   has the tokens that follow those of the states; writes the head's keys and values
        states  [T, hidden]
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocabulary of the model], in fp32; -inf for tokens that the
        head does not know"""
        ...

    def targets(self) -> dict[str, Target]: ...

    def checkpoint_name(self, name: str) -> str: ...

    def ignorable_tensors(self) -> tuple[str, ...]: ...

    def finalize(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """layer(s) of projection([norm(embedding), norm(state)]), and a norm.

    The names are those of the head's checkpoint.

    embedding_norm, state_norm  None: there are none
    projection    from both halves to a hidden state
    states_first  whether the state is the first half
    drops_first  whether the embedding that is paired with the state of a request's first token
                  counts as zero
    layers        by name
    norm          of the outcome; None: there is none
    """

    projection: RowParallelLinear
    layers: Mapping[str, Layer]
    embedding_norm: NamedNorm | None = None
    state_norm: NamedNorm | None = None
    states_first: bool = False
    drops_first: bool = False
    norm: NamedNorm | None = None


def projection(
    build: Build, name: str, in_size: int, out_size: int, *, bias: bool
) -> RowParallelLinear:
    """A linear layer that every rank has whole."""
    return RowParallelLinear(build, name, in_size, out_size, bias=bias, group=Group())


class CombiningHead:
    """EAGLE's head, and the layers that a model brings to predict further tokens (MTP)."""

    def __init__(
        self,
        parts: Combination,
        embedding: VocabEmbedding,
        lm_head: LMHead,
        *,
        name_of: Callable[[str], str] = str,
        ignorable: Sequence[str] = (),
        captures: tuple[int, ...] = (),
        hot_ids: Sequence[int] = (),
    ) -> None:
        """A head without weights.

        embedding, lm_head  the model's
        name_of    the name in `targets()` of a checkpoint's tensor
        ignorable  patterns of tensors that the checkpoint may have and that are not used
        captures   as in DraftHead
        hot_ids    the only tokens that it guesses; empty: it guesses all. Source: Zhao et al. 2025,
                   arXiv:2502.14856
        """
        self.captures = captures
        self._parts = parts
        self._embedding = embedding
        self._lm_head = lm_head
        self._name_of = name_of
        self._ignorable = tuple(ignorable)
        self._hot_ids = tuple(hot_ids)
        self._hot: tuple[LMHead, Tensor] | None = None

    def taken(self, states: Tensor) -> Tensor:
        return states

    def forward(self, batch: ForwardBatch, states: Tensor) -> tuple[Tensor, Tensor]:
        parts = self._parts
        embeds = self._embedding(batch.token_ids)
        if parts.drops_first:
            embeds = embeds.masked_fill((batch.positions == 0).unsqueeze(1), 0.0)
        if parts.embedding_norm is not None:
            embeds = parts.embedding_norm.norm(embeds)
        if parts.state_norm is not None:
            states = parts.state_norm.norm(states)
        halves = (states, embeds) if parts.states_first else (embeds, states)
        x = parts.projection(torch.cat(halves, dim=-1))
        residual: Tensor | None = None
        for layer in parts.layers.values():
            x, residual = layer(x, residual, batch)
        x = summed(x, residual)
        if parts.norm is not None:
            x = parts.norm.norm(x)
        return x, x

    def logits(self, hidden: Tensor) -> Tensor:
        if self._hot is None:
            return self._lm_head(hidden)
        head, token_ids = self._hot
        return of_all_tokens(head(hidden), token_ids, self._lm_head.vocab_size)

    def targets(self) -> dict[str, Target]:
        parts = self._parts
        found = once_filled(parts.projection.targets(), parts.projection.linear.pack)
        for name, layer in parts.layers.items():
            found |= prefixed(name, once_filled(layer.targets(), layer.pack))
        for named in (parts.embedding_norm, parts.state_norm, parts.norm):
            if named is not None:
                found |= prefixed(named.name, named.norm.targets())
        return found

    def checkpoint_name(self, name: str) -> str:
        return self._name_of(name)

    def ignorable_tensors(self) -> tuple[str, ...]:
        return self._ignorable

    def finalize(self) -> None:
        """The model must be finalized before."""
        self._parts.projection.linear.pack()
        for layer in self._parts.layers.values():
            layer.pack()
        if self._hot_ids:
            device = self._embedding.weight.device
            token_ids = torch.tensor(self._hot_ids, dtype=torch.int64, device=device)
            self._hot = (self._lm_head.only(token_ids), token_ids)


def of_all_tokens(logits: Tensor, token_ids: Tensor, vocab_size: int) -> Tensor:
    """logits [S, tokens] of these token_ids [tokens] -> [S, vocab_size]; -inf for the others"""
    every = logits.new_full((len(logits), vocab_size), -torch.inf)
    return every.index_copy_(1, token_ids, logits)
