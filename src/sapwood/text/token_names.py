"""Names of single tokens, for lists of tokens with their log probabilities."""

from __future__ import annotations

from sapwood.text.decoding import TokenTexts


class TokenNames:
    """Texts and bytes of single tokens; special tokens are shown."""

    def __init__(self, texts: TokenTexts) -> None:
        self._raw = texts.raw

    def text(self, token_id: int) -> str:
        """The token's text in the middle of a text; a part of a character is shown as U+FFFD."""
        return self._raw(token_id).decode(errors="replace")

    def name(self, token_id: int) -> str:
        """A name that no other token has: the text, or for a part of a character its bytes, spelled
        as in OpenAI's API: `bytes:\\\\xe2\\\\x82`."""
        raw = self._raw(token_id)
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)

    def raw(self, token_id: int) -> bytes:
        return self._raw(token_id)
