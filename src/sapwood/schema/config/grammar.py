"""How outputs are held to a grammar."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.limits import GRAMMAR_BYTES

BACKENDS = ("auto", "xgrammar", "llguidance", "none")


@dataclass(frozen=True, slots=True, kw_only=True)
class GrammarConfig:
    grammar_backend: str = option(
        "auto",
        "What enforces JSON schemas, regular expressions and grammars. auto and llguidance: "
        "llguidance, which takes a millisecond to begin with a grammar; xgrammar: xgrammar. auto "
        "and xgrammar leave what theirs cannot enforce, or not in time, to the other one; none "
        "refuses requests that have a grammar.",
        choices=BACKENDS,
    )
    constrained_json_whitespace_pattern: str | None = option(
        None,
        "Regular expression of the whitespace between the parts of JSON under a schema; llguidance "
        "then enforces all schemas. Default: any whitespace.",
    )
    constrained_json_disable_any_whitespace: bool = option(
        False,
        'Under a schema, write JSON on one line, with ", " and ": " as the only whitespace.',
    )
    grammar_compile_timeout: float = option(
        10.0, "A grammar that is not compiled after this long is refused.", unit="seconds"
    )
    grammar_max_bytes: int = option(
        GRAMMAR_BYTES.most, "A grammar whose text is longer than this is refused.", unit="bytes"
    )
    disable_jump_forward: bool = option(
        False,
        "Sample also where the grammar leaves one continuation only. Where steps overlap it is "
        "always so.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if self.grammar_compile_timeout <= 0:
            raise ConfigError(
                f"--grammar-compile-timeout is {self.grammar_compile_timeout} but must be > 0"
            )
        if self.grammar_max_bytes < 1:
            raise ConfigError(f"--grammar-max-bytes is {self.grammar_max_bytes} but must be >= 1")
        pattern = self.constrained_json_whitespace_pattern
        if pattern is None:
            return
        if self.constrained_json_disable_any_whitespace:
            raise ConfigError(
                "--constrained-json-whitespace-pattern and "
                "--constrained-json-disable-any-whitespace contradict each other; give one of them"
            )
        try:
            re.compile(pattern)
        except re.error as error:
            raise ConfigError(
                f"--constrained-json-whitespace-pattern is no regular expression: {error}"
            ) from error
