"""What single tokens are called where they are listed one by one."""

from __future__ import annotations

from sapwood.text.decoding import TokenTexts


class TokenNames:
    """Texts and bytes of single tokens; special tokens are shown."""

    def __init__(self, texts: TokenTexts) -> None:
        self._raw = texts.raw

    def text(self, token_id: int) -> str:
        """As it reads in the middle of a text; a part of a character is U+FFFD."""
        return self._raw(token_id).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """The text, by which tokens can be told apart: a part of a character is spelt as OpenAI
        does, `bytes:\\\\xe2\\\\x82`."""
        raw = self._raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token_id: int) -> bytes:
        return self._raw(token_id)
