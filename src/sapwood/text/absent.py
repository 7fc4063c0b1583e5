"""What stands for the tokenizer where a server has none (`--skip-tokenizer-init`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import tokenizers
from tokenizers import decoders, models

from sapwood.base.errors import InvalidRequest
from sapwood.schema.sampling import SamplingParams
from sapwood.text.tokenizer import Tokenizer

_ANY_ID = 2**31 - 1
_WAY_OUT = (
    "this server was started with --skip-tokenizer-init; send input_ids to /generate, or start it "
    "without that flag"
)


class AbsentTokenizer(Tokenizer):
    """Knows no token: every id is allowed, has no text, and no text can be encoded."""

    def __init__(self) -> None:
        backend = tokenizers.Tokenizer(models.BPE())
        backend.decoder = decoders.ByteLevel()
        super().__init__(backend)
        self.vocab_size = _ANY_ID

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        del texts, add_special_tokens
        refuse_text("a text")

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        del first, second
        refuse_text("a text")

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        del token_ids, skip_special_tokens, spaces_between_special_tokens
        refuse_text("the text of tokens")


def refuse_text(what: str, param: str | None = None) -> NoReturn:
    """Raise InvalidRequest: `what` needs the tokenizer."""
    raise InvalidRequest(f"{what} needs the tokenizer, but {_WAY_OUT}", param=param)


def check_without_tokenizer(sampling: SamplingParams) -> None:
    """InvalidRequest if something in these parameters looks at the text of the output."""
    for name in ("stop", "stop_regex", "grammar"):
        if getattr(sampling, name):
            refuse_text(name, param=name)
