"""A decoder whose hidden states are pooled, for embeddings or scores instead of a next token."""

from __future__ import annotations

from torch import Tensor

from sapwood.layers.forward_batch import ForwardBatch
from sapwood.layers.targets import Target
from sapwood.models.encoder.heads import Head
from sapwood.models.lm.decoder import Decoder


class PooledDecoder:
    """A decoder with a head. It is built, filled and finalized like a Decoder.

    The output layer is neither loaded nor packed.

    decoder  built with tied embeddings, so that it wants no output layer from the checkpoint
    """

    def __init__(self, decoder: Decoder, head: Head) -> None:
        self._decoder = decoder
        self._head = head

    def hidden(self, batch: ForwardBatch) -> Tensor:
        """[T, hidden] after the last norm; writes the KV of all tokens."""
        return self._decoder.forward(batch)

    def answer(self, pooled: Tensor) -> Tensor:
        """The output of the head: pooled [R, hidden] fp32 -> [R, outputs] fp32."""
        return self._head(pooled)

    def targets(self) -> dict[str, Target]:
        return self._decoder.body_targets() | self._head.targets()

    def ignorable_tensors(self) -> tuple[str, ...]:
        return (*self._decoder.ignorable_tensors(), "lm_head.*", "model.lm_head.*")

    def is_elsewhere(self, name: str) -> bool:
        """Whether the tensor of that name, as in `targets()`, is another stage's alone. Each stage
        has the head, which is small."""
        return self._decoder.is_elsewhere(name)

    def checkpoint_name(self, name: str) -> str:
        """The name in `targets()` of a checkpoint's tensor: without a head there is no prefix."""
        own = self._decoder.checkpoint_name(name)
        return own if own.startswith(("model.", "score.", "lm_head.")) else f"model.{own}"

    def finalize(self) -> None:
        self._decoder.pack_layers()
