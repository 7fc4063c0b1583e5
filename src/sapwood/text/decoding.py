"""How the token ids of one tokenizer become text, piece by piece.

The `tokenizers` library decodes a whole list of ids. To decode incrementally and still give the
very same text, we must know which part of a decoder looks beyond one token. Three kinds cover the
field:

    BYTES   byte-level BPE (GPT-2, Llama 3, Qwen): a token is a byte string; the bytes are joined
            and read as UTF-8, malformed parts becoming U+FFFD
    PIECES  sentencepiece-like (Metaspace; Replace, ByteFallback, Fuse, Strip), WordPiece, or no
            decoder: the text of a token depends on nothing but the token, except that the start of
            the text may lose a space and that a run of byte tokens `<0xE4>` is read as a whole
    WINDOW  anything else: the text is found by decoding some tokens of context before the new ones
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from enum import Enum
from typing import Any

import tokenizers

_BYTE_TOKEN = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class DecodeKind(Enum):
    BYTES = "bytes"
    PIECES = "pieces"
    WINDOW = "window"


class Mark(Enum):
    """Stands for a token that has no text of its own.

    BYTE    the token is one byte of a character that is spelled in several tokens
    HIDDEN  the token is a special token that is left out, or an id that the tokenizer does not know
    """

    BYTE = "byte"
    HIDDEN = "hidden"


class TokenTexts:
    """Texts of single tokens, found when first asked for and then kept.

    backend      the tokenizer; it must not be changed afterwards
    special_ids  ids that are left out of the text where special tokens are skipped
    """

    def __init__(self, backend: tokenizers.Tokenizer, special_ids: frozenset[int]) -> None:
        self._backend = backend
        self._special_ids = special_ids
        decoder = _decoder_steps(backend)
        self._has_byte_tokens = any(step["type"] == "ByteFallback" for step in decoder)
        self._anchor: tuple[int, str] | None = None
        self.kind = _kind_of(decoder)
        if self.kind is DecodeKind.PIECES:
            self._anchor = self._find_anchor()
            if self._anchor is None:
                self.kind = DecodeKind.WINDOW
        self.joins_with_space = self._anchor is not None and self.after_start(
            [self._anchor[0]]
        ).startswith(" ")
        self._bytes = {skip: _Table(self._reader_of_bytes(skip)) for skip in (False, True)}
        self._pieces = {skip: _Table(self._reader_of_pieces(skip)) for skip in (False, True)}

    def bytes_of(self, *, skip_special_tokens: bool) -> dict[int, bytes]:
        """For kind BYTES: a table from token id to bytes, which are b"" for a hidden token."""
        return self._bytes[skip_special_tokens]

    def pieces_of(self, *, skip_special_tokens: bool) -> dict[int, str | Mark]:
        """For kind PIECES: a table from token id to the token's text anywhere but at the start."""
        return self._pieces[skip_special_tokens]

    def is_hidden(self, token_id: int, *, skip_special_tokens: bool) -> bool:
        if skip_special_tokens and token_id in self._special_ids:
            return True
        return self._backend.id_to_token(token_id) is None

    def bytes_alone(self, token_id: int) -> bytes | None:
        """The bytes that a token, special or not, adds to a text that has begun.

        b"" for an unknown token; None if the decoder looks at several tokens together.
        """
        if self.kind is DecodeKind.BYTES:
            return bytes(self._bytes[False][token_id])
        if self.kind is not DecodeKind.PIECES:
            return None
        piece = self._pieces[False][token_id]
        if piece is Mark.BYTE:
            return bytes([int((self._backend.id_to_token(token_id) or "")[3:5], 16)])
        return b"" if isinstance(piece, Mark) else piece.encode()

    def raw(self, token_id: int) -> bytes:
        """The bytes that a token, special or not, stands for after some other text.

        A token may be only a part of a character. An id that the tokenizer does not know has b"".
        """
        if self.kind is DecodeKind.BYTES:
            return self.bytes_of(skip_special_tokens=False)[token_id]
        token = self._backend.id_to_token(token_id)
        if token is None:
            return b""
        if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
            return bytes([int(token[3:5], 16)])
        if self.kind is DecodeKind.PIECES:
            return self.after_start([token_id]).encode()
        return self.from_start([token_id]).encode()

    def is_special(self, token_id: int) -> bool:
        return token_id in self._special_ids

    def from_start(self, token_ids: Sequence[int]) -> str:
        """The tokens' text at the very beginning of a text; special tokens are shown."""
        return self._backend.decode(list(token_ids), skip_special_tokens=False)

    def after_start(self, token_ids: Sequence[int]) -> str:
        """For kind PIECES: the tokens' text after some other text; special tokens are shown."""
        assert self._anchor is not None
        anchor_id, anchor_text = self._anchor
        return self.from_start([anchor_id, *token_ids])[len(anchor_text) :]

    def without_gaps(self, token_ids: Sequence[int]) -> str:
        """The text, with special tokens shown, and no space between two neighbouring ones."""
        parts: list[str] = []
        previous_is_special = False
        for token_id in token_ids:
            piece = self._pieces[False][token_id]
            if isinstance(piece, Mark):
                continue
            if not parts:
                piece = self.from_start([token_id])
            is_special = token_id in self._special_ids
            parts.append(piece.removeprefix(" ") if is_special and previous_is_special else piece)
            previous_is_special = is_special
        return "".join(parts)

    def _find_anchor(self) -> tuple[int, str] | None:
        """An id whose text is the token itself, to stand for "some text came before"."""
        for token_id in range(self._backend.get_vocab_size(with_added_tokens=True)):
            token = self._backend.id_to_token(token_id)
            is_plain = token is not None and token.isascii() and token.isalnum()
            if token is not None and is_plain and self.from_start([token_id]) == token:
                return token_id, token
        return None

    def _reader_of_bytes(self, skip: bool) -> Callable[[int], bytes]:
        def read(token_id: int) -> bytes:
            if self.is_hidden(token_id, skip_special_tokens=skip):
                return b""
            token = self._backend.id_to_token(token_id) or ""
            try:
                return bytes([_BYTE_OF_CHARACTER[character] for character in token])
            except KeyError:
                # An added token may have characters outside the byte alphabet: they stand as is.
                return token.encode()

        return read

    def _reader_of_pieces(self, skip: bool) -> Callable[[int], str | Mark]:
        def read(token_id: int) -> str | Mark:
            if self.is_hidden(token_id, skip_special_tokens=skip):
                return Mark.HIDDEN
            token = self._backend.id_to_token(token_id) or ""
            if self._has_byte_tokens and _BYTE_TOKEN.fullmatch(token):
                return Mark.BYTE
            return self.after_start([token_id])

        return read


class _Table(dict[int, Any]):
    """A dict that reads a missing entry once. Threads may race to write it: they write the same."""

    def __init__(self, read: Callable[[int], Any]) -> None:
        super().__init__()
        self._read = read

    def __missing__(self, token_id: int) -> Any:
        value = self[token_id] = self._read(token_id)
        return value


def _decoder_steps(backend: tokenizers.Tokenizer) -> list[dict[str, Any]]:
    """The decoder as a flat list of its steps, each as tokenizer.json spells it."""
    if backend.decoder is None:
        return []
    return _flattened(json.loads(backend.decoder.__getstate__()))


def _flattened(step: dict[str, Any]) -> list[dict[str, Any]]:
    if step["type"] != "Sequence":
        return [step]
    return [inner for part in step["decoders"] for inner in _flattened(part)]


def _kind_of(steps: list[dict[str, Any]]) -> DecodeKind:
    names = [step["type"] for step in steps]
    if "ByteLevel" in names:
        only_joins = set(names) <= {"ByteLevel", "Fuse"} and names.count("ByteLevel") == 1
        return DecodeKind.BYTES if only_joins and names[0] == "ByteLevel" else DecodeKind.WINDOW
    fused = False
    for step in steps:
        name = step["type"]
        if fused and not (name == "Strip" and step["stop"] == 0):
            # Once fused, a step sees the whole text; only stripping its start stays local.
            return DecodeKind.WINDOW
        if name not in {"Replace", "ByteFallback", "Fuse", "Strip", "Metaspace", "WordPiece"}:
            return DecodeKind.WINDOW
        fused = fused or name == "Fuse"
    return DecodeKind.PIECES


def _byte_alphabet() -> dict[str, int]:
    """The character that stands for each byte in byte-level BPE (Radford et al. 2019, GPT-2).

    Printable Latin-1 characters stand for themselves; the other 68 bytes take U+0100 onwards.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    alphabet = {chr(byte): byte for byte in printable}
    alphabet.update({chr(0x100 + rank): byte for rank, byte in enumerate(others)})
    return alphabet


_BYTE_OF_CHARACTER = _byte_alphabet()
