"""What a worker brings for the chats of its model: its tokenizer, its template, its parsers."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import InvalidRequest

MAX_PATH_CHARACTERS = 4096
MAX_TEMPLATE_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelParts:
    """By what the gateway makes texts of a model's tokens.

    tokenizer_path  directory on the gateway's machine
    chat_template   file, built-in name or text of a template that replaces the tokenizer's own
    tool_parser, reasoning_parser   formats; None for both: the workers make the chats
    """

    tokenizer_path: str
    chat_template: str | None = None
    tool_parser: str | None = None
    reasoning_parser: str | None = None

    @property
    def makes_chats(self) -> bool:
        return self.tool_parser is not None or self.reasoning_parser is not None

    def check(self) -> None:
        """InvalidRequest if these parts cannot be meant so."""
        if not 1 <= len(self.tokenizer_path) <= MAX_PATH_CHARACTERS:
            raise InvalidRequest(
                f"tokenizer_path has {len(self.tokenizer_path)} characters but must have 1 to "
                f"{MAX_PATH_CHARACTERS}",
                param="tokenizer_path",
            )
        if self.chat_template is None:
            return
        if len(self.chat_template) > MAX_TEMPLATE_CHARACTERS:
            raise InvalidRequest(
                f"chat_template has {len(self.chat_template)} characters but may have at most "
                f"{MAX_TEMPLATE_CHARACTERS}",
                param="chat_template",
            )
        if not self.makes_chats:
            raise InvalidRequest(
                "chat_template does nothing unless the gateway makes the chats; give tool_parser "
                "or reasoning_parser too",
                param="chat_template",
            )
