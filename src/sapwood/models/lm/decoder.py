"""A decoder-only language model, whose parts are those of its architecture."""

from __future__ import annotations

from collections.abc import Collection

from torch import Tensor

from sapwood.kernels.recording import CannotRecord, Program
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import Stream, summed
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.registry import decoder_class
from sapwood.models.text_part import IS_TEXT_PART, OTHER_TENSORS, text_name


class Decoder:
    """From token ids to logits.

    To use a decoder, construct it (parameters are uninitialised memory), fill all `targets()` (see
    models/loader/assign), call `finalize()`, then `compute` under torch.inference_mode().

    A decoder can be filled again in the same way, with targets that `targets()` gives anew. Steps
    that kernels recorded before compute with the weights from then, and must be recorded anew.
    """

    def __init__(self, architecture: Architecture) -> None:
        """A decoder without weights."""
        self._architecture = architecture
        self.config = architecture.config
        self._names = architecture.names
        self._embedding = architecture.embedding()
        self._positions = architecture.positions()
        self._embedding_norm = architecture.embedding_norm()
        self._layers = tuple(architecture.layer(i) for i in range(self.config.num_layers))
        self._streams = architecture.streams()
        self._norm = architecture.norm() if self._streams is None else None
        tied = self._embedding if self.config.tie_word_embeddings else None
        self._lm_head = architecture.head(tied)

    @property
    def tensor_names(self) -> Names:
        """The names of the model's parts in the checkpoint."""
        return self._names

    @staticmethod
    def of(config: DecoderConfig, build: Build) -> Decoder:
        """A decoder of the architecture that the config names."""
        return Decoder(decoder_class(config.architecture)(config, build))

    @property
    def embedding(self) -> VocabEmbedding:
        """Which a draft head may share."""
        return self._embedding

    @property
    def lm_head(self) -> LMHead:
        """Which a draft head may share."""
        return self._lm_head

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states after the last norm, [T, hidden]; writes every layer's KV."""
        return self.forward_capturing(batch, ())[0]

    def forward_capturing(
        self, batch: ForwardBatch, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """(as `forward`, the hidden states [T, hidden] that enter each of `layers`, in the order of
        the model's layers)"""
        captured: list[Tensor] = []
        x = self._embedding(batch.token_ids)
        if batch.embeds is not None:
            x = x.index_copy(0, batch.embeds.at, batch.embeds.vectors.to(x.dtype))
        if self._streams is not None:
            x = self._streams.opened(x, batch)
        if self._positions is not None:
            x = x + self._positions(batch.positions)
        if self._embedding_norm is not None:
            x = self._embedding_norm(x)
        residual: Tensor | None = None
        for index, layer in enumerate(self._layers):
            if index in layers:
                # A copy: a layer may add to what it gets.
                captured.append(x.clone() if residual is None else x + residual)
            x, residual = layer(x, residual, batch)
        if self._norm is None:
            assert self._streams is not None
            return self._streams.closed(summed(x, residual)), captured
        return self._norm(x) if residual is None else self._norm.add(x, residual)[0], captured

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        return self._lm_head(hidden)

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits of the rows at batch.logits_index, [S, vocab]; no others are computed."""
        return self.logits(self.forward(batch).index_select(0, batch.logits_index))

    def program(self, states: Collection[int] | None = None) -> Program:
        """`compute` as a program, for kernels that run it in one call.

        states  what the step hands out too: the hidden states that enter each of these layers, side
                by side; if there are none, those after the last norm; None: nothing
        Raises CannotRecord if a part of the model is no op of programs, and RuntimeError before
        `finalize`."""
        program = Program(self._architecture.build.dtype)
        if self._norm is None:
            raise CannotRecord("a recorded step has no streams beside the hidden states")
        x = self._embedding.record(program)
        if self._positions is not None:
            self._positions.record(program, x)
        if self._embedding_norm is not None:
            x = self._embedding_norm.record(program, x)
        stream = Stream(x, None)
        for index, layer in enumerate(self._layers):
            if states and index in states:
                program.keep_states(*stream)
            stream = layer.record(program, stream)
        normed = self._norm.record(program, stream.x, stream.residual)
        if states is not None and not states:
            program.keep_states(normed, None)
        self._lm_head.record(program, normed)
        return program

    def targets(self) -> dict[str, Target]:
        """The target of every parameter of this rank, by the name in the checkpoint.

        A layer is packed as soon as all of its tensors are placed.
        """
        found = self.body_targets()
        if self.config.tie_word_embeddings:
            found[f"{self._names.embedding}.weight"] = self._lm_head.tied_target()
            return found | prefixed(self._names.head, self._lm_head.targets())
        head = once_filled(self._lm_head.targets(), self._lm_head.pack)
        return found | prefixed(self._names.head, head)

    def body_targets(self) -> dict[str, Target]:
        """The targets without the output layer's, for a model that does not use that layer."""
        names = self._names
        found = prefixed(names.embedding, self._embedding.targets())
        if self._positions is not None:
            found |= prefixed(names.positions, self._positions.targets())
        if self._embedding_norm is not None:
            found |= prefixed(names.embedding_norm, self._embedding_norm.targets())
        for index, layer in enumerate(self._layers):
            found |= prefixed(names.layer(index), once_filled(layer.targets(), layer.pack))
        if self._norm is None:
            assert self._streams is not None
            return found | self._streams.targets()
        return found | prefixed(names.norm, self._norm.targets())

    def adapter_targets(self) -> dict[str, Target]:
        """Targets that say where adapters add; they are not for loading."""
        head = prefixed(self._names.head, self._lm_head.adapter_targets())
        return self.body_targets() | head

    def checkpoint_name(self, name: str) -> str:
        """The name in `targets()` of a checkpoint's tensor."""
        own = text_name(name) if IS_TEXT_PART in self.config.hf else name
        return self._architecture.checkpoint_name(own)

    def ignorable_tensors(self) -> tuple[str, ...]:
        """Patterns (fnmatch) of tensors that a checkpoint may have and that are not used."""
        architecture = self._architecture
        tied = architecture.ignorable_when_tied if self.config.tie_word_embeddings else ()
        others = OTHER_TENSORS if IS_TEXT_PART in self.config.hf else ()
        return architecture.ignorable + tied + others

    def finalize(self) -> None:
        """Pack the linear layers, once all weights are placed."""
        self.pack_layers()
        self._lm_head.pack()

    def pack_layers(self) -> None:
        """Pack all linear layers but the output layer, for a model that does not use that layer."""
        for layer in self._layers:
            layer.pack()
        if self._streams is not None:
            self._streams.pack()
