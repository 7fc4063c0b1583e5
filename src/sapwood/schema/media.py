"""Prepared pictures, videos and sounds, as they cross from the API process to the engine."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from sapwood.schema.media_source import MediaKind

HEAVY = ("pixel", "input_features")
"""Begin the names of tensors that only the tower reads: pixel_values, pixel_values_videos,
pixel_mask, and input_features of sounds."""


class MediaTensor(msgspec.Struct, frozen=True, kw_only=True):
    """
    dtype  numpy's name: float32, int64
    data   little endian, row by row
    """

    dtype: str
    shape: tuple[int, ...]
    data: bytes


class Medium(msgspec.Struct, frozen=True, kw_only=True):
    """One picture or video that a prompt shows, or a sound that its layers attend to.

    digest   SHA-256 of the decoded pixels and of everything that preparing depends on: media with
             one digest have the same tensors
    tensors  what the model's tower reads, by the names that transformers' processors give them
    spans    (first position, length) in prompt_ids whose embeddings are the tower's vectors, in the
             order of the vectors
    num_across  vectors of a medium that no token's place is taken by, since layers attend to them
             across instead; its one span is the first token, from which on everything depends on
             it. 0: the vectors stand at the spans
    """

    kind: MediaKind
    digest: bytes
    tensors: dict[str, MediaTensor]
    spans: tuple[tuple[int, int], ...]
    num_across: int = 0

    @property
    def num_tokens(self) -> int:
        return sum(length for _, length in self.spans)

    @property
    def num_vectors(self) -> int:
        return self.num_across or self.num_tokens

    @property
    def without_pixels(self) -> Medium:
        """The same without what only the tower reads."""
        small = {name: one for name, one in self.tensors.items() if not name.startswith(HEAVY)}
        return msgspec.structs.replace(self, tensors=small)


def num_tokens_of(media: Iterable[Medium], kind: MediaKind) -> int:
    """Tokens of a prompt that show media of that kind."""
    return sum(medium.num_tokens for medium in media if medium.kind == kind)
