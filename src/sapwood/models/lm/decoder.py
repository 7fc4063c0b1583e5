"""A decoder-only language model, whose parts are those of its architecture."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

from torch import Tensor

from sapwood.distributed.pipe import Pipe
from sapwood.kernels.recording import Add, CannotRecord, Program
from sapwood.layers.build import Build
from sapwood.layers.embedding import LMHead, VocabEmbedding
from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.layer import FeedForward, Stream, summed
from sapwood.layers.renewal import Renewal
from sapwood.layers.shared_feed_forward import SharedFeedForward
from sapwood.layers.shared_rows import SharedRows
from sapwood.layers.targets import Target, once_filled, prefixed
from sapwood.models.config import DecoderConfig
from sapwood.models.lm.architecture import Architecture, Names
from sapwood.models.registry import decoder_class
from sapwood.models.text_part import IS_TEXT_PART, OTHER_TENSORS, text_name
from sapwood.schema.stage import Stage, whole_model


class Decoder:
    """From token ids to logits.

    To use a decoder, construct it (parameters are uninitialised memory), fill all `targets()` (see
    models/loader/assign), call `finalize()`, then `compute` under torch.inference_mode().

    A decoder can be filled again in the same way, with targets that `targets()` gives anew. Steps
    that kernels recorded before compute with the weights from then, and must be recorded anew.

    One stage of a model has its own layers only. It takes hidden states from the stage before, and
    sends what `forward` returns to the stage after it; only the last one computes logits.
    """

    def __init__(
        self, architecture: Architecture, stage: Stage | None = None, pipe: Pipe | None = None
    ) -> None:
        """A decoder without weights.

        stage  which layers it has; None: all
        pipe   joins it to the other stages, if there are any"""
        self._architecture = architecture
        config = self.config = architecture.config
        stage = self._stage = stage or whole_model(config.num_layers)
        assert (pipe is None) == (stage.count == 1)
        self._pipe = pipe
        self._names = architecture.names
        has_embedding = stage.is_first or (stage.is_last and config.tie_word_embeddings)
        self._embedding = architecture.embedding() if has_embedding else None
        self._positions = architecture.positions() if stage.is_first else None
        self._embedding_norm = architecture.embedding_norm() if stage.is_first else None
        self._layers = tuple(architecture.layer(index) for index in stage.layers)
        # Of several stages every one has them: their names tell which tensors are not layers'.
        self._streams = architecture.streams()
        has_norm = stage.is_last and self._streams is None
        self._norm = architecture.norm() if has_norm else None
        tied = self._embedding if config.tie_word_embeddings else None
        self._lm_head = architecture.head(tied) if stage.is_last else None
        self._rows = architecture.build.rows
        self._shared: list[SharedFeedForward] = []
        if self._rows is not None:
            for layer in self._layers:
                layer.change_feed_forwards(partial(self._share, self._rows))

    @property
    def tensor_names(self) -> Names:
        """The names of the model's parts in the checkpoint."""
        return self._names

    @staticmethod
    def of(
        config: DecoderConfig, build: Build, stage: Stage | None = None, pipe: Pipe | None = None
    ) -> Decoder:
        """A decoder of the architecture that the config names; stage and pipe as above."""
        return Decoder(decoder_class(config.architecture)(config, build), stage, pipe)

    @property
    def renewal(self) -> Renewal:
        """Of the layers of this model, and of heads that its checkpoint has."""
        return self._architecture.build.renewal

    @property
    def embedding(self) -> VocabEmbedding:
        """Which a draft head may share; the first stage has it."""
        assert self._embedding is not None
        return self._embedding

    @property
    def lm_head(self) -> LMHead:
        """Which a draft head may share; the last stage has it."""
        assert self._lm_head is not None
        return self._lm_head

    def forward(self, batch: ForwardBatch) -> Tensor:
        """Hidden states after the last norm, [T, hidden]; of a stage that is not the last, what
        goes through the layers, [T, width]. Writes the KV of all of its layers."""
        return self.forward_capturing(batch, ())[0]

    def forward_capturing(
        self, batch: ForwardBatch, layers: Collection[int]
    ) -> tuple[Tensor, list[Tensor]]:
        """(as `forward`, the hidden states [T, hidden] that enter each of `layers`, in the order of
        the model's layers; the number of layers stands for the last norm)"""
        captured: list[Tensor] = []
        if self._rows is not None:
            self._rows.begin(len(batch.token_ids))
        if self._stage.is_first:
            x = self._opened(batch)
        else:
            assert self._pipe is not None
            x = self._pipe.receive(len(batch.token_ids))
        residual: Tensor | None = None
        for index, layer in zip(self._stage.layers, self._layers, strict=True):
            if index in layers:
                # A copy: a layer may add to what it gets.
                captured.append(x.clone() if residual is None else x + residual)
            x, residual = layer(x, residual, batch)
            if batch.embeds is not None and index < len(batch.embeds.later):
                x = x.index_add(0, batch.embeds.at, batch.embeds.later[index].to(x.dtype))
        if self.config.num_layers in layers:
            captured.append(x.clone() if residual is None else x + residual)
        if not self._stage.is_last:
            assert self._pipe is not None
            x = summed(x, residual)
            self._pipe.send(x)
            return x, captured
        if self._norm is None:
            assert self._streams is not None
            return self._streams.closed(summed(x, residual)), captured
        return self._norm(x) if residual is None else self._norm.add(x, residual)[0], captured

    def _opened(self, batch: ForwardBatch) -> Tensor:
        """What the first layer takes, [T, width]."""
        x = self.embedding(batch.token_ids)
        if batch.embeds is not None:
            x = x.index_copy(0, batch.embeds.at, batch.embeds.vectors.to(x.dtype))
        if self._streams is not None:
            x = self._streams.opened(x, batch)
        if self._positions is not None:
            x = x + self._positions(batch.positions)
        if self._embedding_norm is not None:
            x = self._embedding_norm(x)
        return x

    def logits(self, hidden: Tensor) -> Tensor:
        """hidden [S, hidden] -> [S, vocab], in fp32"""
        rows = self._rows_of_head
        if rows is None:
            return self.lm_head(hidden)
        if not len(hidden):
            return self.lm_head.empty()
        rows.begin(len(hidden))
        return rows.own(self.lm_head(rows.gathered(hidden)))

    def take_part(self) -> None:
        """Compute this rank's part of a step whose requests are all those of other ranks."""
        assert self._rows is not None
        self._rows.begin(0)
        for feed_forward in self._shared:
            feed_forward.take_part()
        self.end_step()

    def end_step(self) -> None:
        """Compute this rank's part of logits until no rank wants any more of this step. To be
        called after the last logits of a step, if ranks share feed-forwards."""
        rows = self._rows_of_head
        while rows is not None and rows.begin(0):
            self.lm_head(rows.gathered(rows.none))

    def compute(self, batch: ForwardBatch) -> Tensor:
        """Logits of the rows at batch.logits_index, [S, vocab]; no others are computed."""
        return self.logits(self.forward(batch).index_select(0, batch.logits_index))

    @property
    def _rows_of_head(self) -> SharedRows | None:
        """The rows of an output layer that ranks share though each has its own requests; None:
        there is no such layer."""
        return self._rows if self.lm_head.num_ranks > 1 else None

    def _share(self, rows: SharedRows, feed_forward: FeedForward) -> FeedForward:
        self._shared.append(SharedFeedForward(feed_forward, rows))
        return self._shared[-1]

    def program(self, states: Collection[int] | None = None) -> Program:
        """`compute` as a program, for kernels that run it in one call.

        states  what the step hands out too: the hidden states that enter each of these layers, side
                by side; if there are none, those after the last norm; None: nothing
        Raises CannotRecord if a part of the model is no op of programs, and RuntimeError before
        `finalize`."""
        program = Program(self._architecture.build.dtype)
        if self._stage.count > 1:
            raise CannotRecord(f"{self._stage.count} stages compute it one after the other")
        if states and self.config.num_layers in states:
            raise CannotRecord("it hands out no states before the last norm")
        x = self.embedding.record(program)
        if self._streams is not None:
            x = self._streams.record_opened(program, x)
        if self._positions is not None:
            self._positions.record(program, x)
        if self._embedding_norm is not None:
            x = self._embedding_norm.record(program, x)
        stream = Stream(x, None)
        for index, layer in enumerate(self._layers):
            if states and index in states:
                program.keep_states(*stream)
            stream = layer.record(program, stream)
        if self._streams is None:
            assert self._norm is not None, "a model of one stage has its last layer"
            normed = self._norm.record(program, stream.x, stream.residual)
        else:
            total = stream.x
            if stream.residual is not None:
                program.add(Add(x=stream.x, residual=stream.residual))
                total = stream.residual
            normed = self._streams.record_closed(program, total)
        if states is not None and not states:
            program.keep_states(normed, None)
        self.lm_head.record(program, normed)
        return program

    def targets(self) -> dict[str, Target]:
        """The target of every parameter of this rank, by the name in the checkpoint.

        A layer is packed as soon as all of its tensors are placed.
        """
        found = self.body_targets()
        if self._lm_head is None:
            return found
        if self.config.tie_word_embeddings:
            found[f"{self._names.embedding}.weight"] = self._lm_head.tied_target()
            return found | prefixed(self._names.head, self._lm_head.targets())
        head = once_filled(self._lm_head.targets(), self._lm_head.pack)
        return found | prefixed(self._names.head, head)

    def body_targets(self) -> dict[str, Target]:
        """The targets without the output layer's, for a model that does not use that layer."""
        names = self._names
        found: dict[str, Target] = {}
        if self._embedding is not None:
            found |= prefixed(names.embedding, self._embedding.targets())
        if self._positions is not None:
            found |= prefixed(names.positions, self._positions.targets())
        if self._embedding_norm is not None:
            found |= prefixed(names.embedding_norm, self._embedding_norm.targets())
        for index, layer in zip(self._stage.layers, self._layers, strict=True):
            found |= prefixed(names.layer(index), once_filled(layer.targets(), layer.pack))
        if self._streams is not None:
            found |= self._streams.targets()
        if self._norm is not None:
            found |= prefixed(names.norm, self._norm.targets())
        return found

    def is_elsewhere(self, name: str) -> bool:
        """Whether the tensor of that name, as in `targets()`, is another stage's alone."""
        names, stage = self._names, self._stage
        if name.startswith(f"{names.layers}."):
            index, _, _ = name.removeprefix(f"{names.layers}.").partition(".")
            if index.isdecimal() and int(index) < self.config.num_layers:
                return int(index) not in stage.layers
        elsewhere: list[str] = []
        if self._embedding is None:
            elsewhere.append(names.embedding)
        if not stage.is_first:
            elsewhere += [names.positions, names.embedding_norm]
        if not stage.is_last:
            elsewhere.append(names.head)
        if not stage.is_last and self._streams is None:
            elsewhere.append(names.norm)
        return name.startswith(tuple(f"{part}." for part in elsewhere))

    def adapter_targets(self) -> dict[str, Target]:
        """Targets that say where adapters add; they are not for loading."""
        found = self.body_targets()
        if self._lm_head is not None:
            found |= prefixed(self._names.head, self._lm_head.adapter_targets())
        return found

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
        if self._lm_head is not None:
            self._lm_head.pack()

    def pack_layers(self) -> None:
        """Pack all linear layers but the output layer, for a model that does not use that layer."""
        for layer in self._layers:
            layer.pack()
        if self._streams is not None:
            self._streams.pack()
