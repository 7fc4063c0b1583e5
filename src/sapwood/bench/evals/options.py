"""Options of the evaluations. No torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions:
    """The text that is scored."""

    text_file: str | None = option(
        None, "Text to score, UTF-8; default: the docstrings of Python's standard library."
    )
    num_text_tokens: int = option(32768, "Tokens of the text to score at most.", unit="tokens")
    window: int = option(1024, "Tokens that are scored on their own context.", unit="tokens")
    output_dir: str = option("bench-results", "Directory for the JSON file.")

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ConfigError(f"--window is {self.window} but must be >= 2")
        if self.num_text_tokens < self.window:
            raise ConfigError(
                f"--num-text-tokens is {self.num_text_tokens} but must be at least one --window "
                f"({self.window})"
            )
