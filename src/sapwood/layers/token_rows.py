"""Tokens of several pictures in one tensor, without padding: what belongs to which picture.

A step of a diffusion transformer has rows, one per picture, or two with guidance. A row has text
and picture tokens, as many as it likes, and a timestep of its own. Linear layers see all tokens
[T, size]; norms and gates see each row's tokens with that row's numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TokenRows:
    """The rows' numbers of tokens; the tokens lie row after row."""

    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.lengths or min(self.lengths) < 0:
            raise ValueError(f"a step needs rows of 0 tokens or more, got {self.lengths}")

    @staticmethod
    def of(pieces: Sequence[Tensor]) -> TokenRows:
        return TokenRows(tuple(len(piece) for piece in pieces))

    @property
    def spans(self) -> list[slice]:
        ends = list(accumulate(self.lengths, initial=0))
        return [slice(a, b) for a, b in pairwise(ends)]

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """x [T, …] -> the rows' tokens, as views"""
        return torch.split(x, list(self.lengths))


def packed(pieces: Sequence[Tensor]) -> Tensor:
    """Tensors [n, …] one after the other; a single one is not copied."""
    return pieces[0] if len(pieces) == 1 else torch.cat(tuple(pieces))


@dataclass(frozen=True, slots=True)
class JointRows:
    """Two streams, whose tokens attend to each other: in a row, `first` come before `second`."""

    first: TokenRows
    second: TokenRows

    @property
    def joint(self) -> TokenRows:
        pairs = zip(self.first.lengths, self.second.lengths, strict=True)
        return TokenRows(tuple(a + b for a, b in pairs))

    @property
    def places(self) -> tuple[list[tuple[slice, slice]], list[tuple[slice, slice]]]:
        """Of each stream, row by row: (its tokens, where they are among the joint ones)"""
        firsts: list[tuple[slice, slice]] = []
        seconds: list[tuple[slice, slice]] = []
        start = 0
        for first, second in zip(self.first.spans, self.second.spans, strict=True):
            middle = start + first.stop - first.start
            end = middle + second.stop - second.start
            firsts.append((first, slice(start, middle)))
            seconds.append((second, slice(middle, end)))
            start = end
        return firsts, seconds

    def join(self, first: Tensor, second: Tensor) -> Tensor:
        """[T1, …] and [T2, …] -> [T1 + T2, …], row after row"""
        pairs = zip(self.first.split(first), self.second.split(second), strict=True)
        return torch.cat([piece for pair in pairs for piece in pair])

    def part(self, joint: Tensor) -> tuple[Tensor, Tensor]:
        """The two streams of `join`; views, if there is one row"""
        pairs = zip(self.first.lengths, self.second.lengths, strict=True)
        pieces = torch.split(joint, [length for pair in pairs for length in pair])
        return packed(pieces[::2]), packed(pieces[1::2])
