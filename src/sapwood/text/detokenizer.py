"""Tokens to text while they are generated."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from itertools import chain
from typing import Protocol

from sapwood.text.decoding import DecodeKind, Mark, TokenTexts
from sapwood.text.tokenizer import Tokenizer

_CONTEXT_TOKENS = 6
"""Tokens decoded before the new ones where a token's text depends on its neighbours."""

_MAX_HELD_TOKENS = 64
"""Tokens that may wait for a character to complete; a character has at most 4 bytes."""


class _Strategy(Protocol):
    def push(self, token_ids: Sequence[int]) -> str: ...

    def finish(self) -> str: ...


class IncrementalDetokenizer:
    """The text of one request's output, token by token.

    The joined results of `push` and `finish` equal `tokenizer.decode` of all token ids. A piece
    never holds a broken character: the bytes of an incomplete character wait for the rest. At the
    end they become U+FFFD, as in a whole decode. The work per token does not grow with the text.

    Where a tokenizer spells characters in byte tokens (`<0xE4>`), a run of them waits until it
    ends, because the library reads a run as a whole: one malformed byte makes all of it U+FFFD.

    For a decoder of unknown kind (`DecodeKind.WINDOW`) the text is found from a window of context,
    which is exact if no step looks back further than that.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> None:
        texts = tokenizer.texts
        self._strategy: _Strategy
        if texts.kind is DecodeKind.BYTES:
            self._strategy = _Bytes(texts, skip_special_tokens)
        elif texts.kind is DecodeKind.PIECES:
            no_gaps = texts.joins_with_space and not (
                skip_special_tokens or spaces_between_special_tokens
            )
            self._strategy = _Pieces(texts, skip_special_tokens, no_gaps=no_gaps)
        else:
            self._strategy = _Window(texts, skip_special_tokens)

    def push(self, token_ids: Sequence[int]) -> str:
        """The new text of these token ids; "" while a character is not complete."""
        return self._strategy.push(token_ids)

    def finish(self) -> str:
        """The text that was held back. Nothing may be pushed afterwards."""
        return self._strategy.finish()


class _Bytes:
    """Byte-level BPE: look the bytes up, join, and read them as UTF-8 with memory."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._bytes_of = texts.bytes_of(skip_special_tokens=skip_special_tokens).__getitem__
        self._read = codecs.getincrementaldecoder("utf-8")(errors="replace").decode

    def push(self, token_ids: Sequence[int]) -> str:
        return self._read(b"".join(map(self._bytes_of, token_ids)))

    def finish(self) -> str:
        return self._read(b"", True)


class _Pieces:
    """Each token has its own text; only the start and runs of byte tokens need the decoder."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool, *, no_gaps: bool) -> None:
        self._texts = texts
        self._pieces = texts.pieces_of(skip_special_tokens=skip_special_tokens)
        self._no_gaps = no_gaps
        self._started = False
        self._held: list[int] = []
        self._previous_is_special = False

    def push(self, token_ids: Sequence[int]) -> str:
        parts: list[str] = []
        pieces = self._pieces
        for token_id in token_ids:
            piece = pieces[token_id]
            if piece is Mark.HIDDEN:
                continue
            if not self._started:
                self._held.append(token_id)
                if piece is not Mark.BYTE:
                    parts.append(self._flush())
            elif isinstance(piece, Mark):
                self._held.append(token_id)
            else:
                if self._held:
                    parts.append(self._flush())
                parts.append(self._close_gap(token_id, piece) if self._no_gaps else piece)
            if self._no_gaps:
                self._previous_is_special = self._texts.is_special(token_id)
        return "".join(parts)

    def finish(self) -> str:
        return self._flush() if self._held else ""

    def _flush(self) -> str:
        if self._started:
            text = self._texts.after_start(self._held)
            self._held.clear()
            return text
        text = self._texts.from_start(self._held)
        if text:
            # While no text has come out, the decoder is at the start, where a space may vanish.
            self._started = True
            self._held.clear()
        return text

    def _close_gap(self, token_id: int, piece: str) -> str:
        joins = self._previous_is_special and self._texts.is_special(token_id)
        return piece.removeprefix(" ") if joins else piece


class _Window:
    """Decode a few tokens of context with and without the new ones; the difference is new."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._texts = texts
        self._skip = skip_special_tokens
        self._context: list[int] = []
        self._context_text = ""
        self._held: list[int] = []

    def push(self, token_ids: Sequence[int]) -> str:
        shown = [
            token_id
            for token_id in token_ids
            if not self._texts.is_hidden(token_id, skip_special_tokens=self._skip)
        ]
        if not shown:
            return ""
        self._held.extend(shown)
        text = self._text_of_held()
        if text.endswith("\ufffd") and len(self._held) <= _MAX_HELD_TOKENS:
            return ""
        self._context = list(chain(self._context, self._held))[-_CONTEXT_TOKENS:]
        self._context_text = self._texts.from_start(self._context)
        self._held = []
        return text

    def finish(self) -> str:
        text = self._text_of_held() if self._held else ""
        self._held = []
        return text

    def _text_of_held(self) -> str:
        return self._texts.from_start([*self._context, *self._held])[len(self._context_text) :]
