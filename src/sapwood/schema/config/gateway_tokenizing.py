"""The gateway's own tokenizers, and what it makes of their tokens."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.listening import ListeningConfig
from sapwood.schema.config.options import option

SCOPE = "gateway"
"""These flags mean something else to `sapwood serve`, and a machine or a file may have both."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizingConfig(ListeningConfig):
    model_path: str | None = option(
        None,
        "Directory of the model that the workers serve, for its tokenizer and chat template. More "
        "can be added at run time by POST /v1/tokenizers; default: none.",
        scope=SCOPE,
    )
    tokenizer_path: str | None = option(
        None, "Directory of the tokenizer's files; default: --model-path.", scope=SCOPE
    )
    chat_template: str | None = option(
        None,
        "Chat template that replaces the tokenizer's own where the gateway makes the chats: a "
        "file, jinja text or a built-in name.",
        scope=SCOPE,
    )
    tool_call_parser: str | None = option(
        None,
        "Make chat completions at the gateway, of engines' /generate, and parse tool calls in "
        "this format; auto: as the chat template points at, none: not at all. Needs "
        "--tokenizer-path or --model-path; default: the workers make them.",
        scope=SCOPE,
    )
    reasoning_parser: str | None = option(
        None,
        "Likewise, with thinking in this format taken apart; default: auto where "
        "--tool-call-parser is given.",
        scope=SCOPE,
    )
    tokenizer_cache_enable_l0: bool = option(
        False, "Remember the token ids of whole texts, so that equal ones are encoded once."
    )
    tokenizer_cache_l0_max_entries: int = option(
        10_000, "So many texts are remembered per tokenizer.", unit="texts"
    )
    tokenizer_cache_enable_l1: bool = option(
        False,
        "Remember the token ids of pieces between special tokens, so that only a conversation's "
        "new messages are encoded.",
    )
    tokenizer_cache_l1_max_memory: int = option(
        50 * 2**20, "Memory of these pieces, per tokenizer.", unit="bytes"
    )

    def __post_init__(self) -> None:
        super(TokenizingConfig, self).__post_init__()
        for name in ("tokenizer_cache_l0_max_entries", "tokenizer_cache_l1_max_memory"):
            if getattr(self, name) < 1:
                raise ConfigError(
                    f"--{name.replace('_', '-')} is {getattr(self, name)} but must be >= 1"
                )
        if self.makes_chats and self.tokenizer_source is None:
            raise ConfigError(
                "--tool-call-parser and --reasoning-parser make chats at the gateway, which needs "
                "the model's tokenizer: give --tokenizer-path or --model-path"
            )
        if self.chat_template is not None and not self.makes_chats:
            raise ConfigError(
                "--chat-template does nothing unless the gateway makes the chats; give "
                "--tool-call-parser or --reasoning-parser too"
            )

    @property
    def tokenizer_source(self) -> str | None:
        return self.tokenizer_path or self.model_path

    @property
    def makes_chats(self) -> bool:
        """Whether chats are made at the gateway instead of at the workers."""
        return self.tool_call_parser is not None or self.reasoning_parser is not None
