"""The units of random prompts: token ids of a model, or plain words.

Only ordinary tokens are drawn. A special token in the middle of a prompt could end a turn or switch
a mode, and a benchmark of that says little about real prompts.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from sapwood.base.errors import ConfigError

Prompt = tuple[int, ...] | str
"""Token ids, or text."""

MIN_TOKENS = 16
"""A smaller vocabulary would make prompts that repeat themselves."""


class Vocabulary(Protocol):
    def draw(self, rng: random.Random, count: int) -> tuple[int, ...]:
        """`count` random units, each of which is one token, or a word of about one token."""
        ...

    def render(self, units: Sequence[int]) -> Prompt: ...


@dataclass(frozen=True, slots=True)
class TokenVocabulary:
    """Prompts as token ids: their lengths are exact, whatever the tokenizer.

    token_ids  the ids that may be drawn
    """

    token_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        if len(self.token_ids) < MIN_TOKENS:
            raise ConfigError(
                f"the vocabulary has {len(self.token_ids)} ordinary tokens but prompts need at "
                f"least {MIN_TOKENS}; name another tokenizer"
            )

    def draw(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.choices(self.token_ids, k=count))

    def render(self, units: Sequence[int]) -> Prompt:
        return tuple(units)


@dataclass(frozen=True, slots=True)
class WordVocabulary:
    """Prompts as text, for servers that take nothing else; a word is about one token."""

    words: tuple[str, ...]

    def draw(self, rng: random.Random, count: int) -> tuple[int, ...]:
        return tuple(rng.choices(range(len(self.words)), k=count))

    def render(self, units: Sequence[int]) -> Prompt:
        return " ".join(self.words[unit] for unit in units)


_WORD_LIST = """
able above across act add afternoon again age air answer apple arm art ask autumn baker ball bank
bell bird boat body book bottle box branch bread bridge bright bring brother build burn bus call
candle carry castle cat chair change child circle city clean clear climb clock cloud coat cold
colour cook corner cotton count cover cow cross crowd cup dance dark day deep desk door draw dream
dress drink drive dry dust ear early earth east easy edge egg eight empty end engine enter evening
eye face fall family farm fast field find finger fire fish five floor flower fly follow food foot
forest four free fresh friend front fruit game garden gate gift glass gold grass green ground grow
hall hammer hand happy hard hat head hear heart heavy hill hold home horse hot hour house ice idea
iron island join jump keep key kind king kitchen know lake lamp land large late laugh lead leaf
learn left letter light line lion list long look low lunch map mark market meat metal milk mind
mirror moon morning mountain mouth move music name near neck new night noise north nose number oil
old open orange paint paper park part path pen pencil people piece plant plate play pocket point
pool potato pull purple push queen quick quiet rain read red rest rice ride ring river road rock
roof room root rope round run salt sand school sea seat seed seven sheep ship shirt shoe shop
short show side silver sing sister sit six skin sky sleep slow small smile snow soft song south
spoon spring square stand star stone story street strong sugar summer sun swim table tail talk
tall tea ten thick thin three ticket time town train travel tree turn twelve two under uncle
village visit voice wait walk wall warm wash watch water wave west wheel white wide wind window
wine winter wood wool word work world write yellow young
"""
WORDS = tuple(_WORD_LIST.split())
"""Common short words, most of which are one token of most tokenizers."""


def read_vocabulary(path: Path) -> TokenVocabulary:
    """The ordinary tokens of a tokenizer.json, or of the directory that holds one.

    ConfigError if there is no tokenizer at that path.
    """
    from tokenizers import Tokenizer

    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(f"there is no tokenizer at {file}; name a directory with tokenizer.json")
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # The tokenizers library raises nothing more precise.
        raise ConfigError(f"{file} is not a tokenizer: {error}") from error
    added = tokenizer.get_added_tokens_decoder()
    ids = tokenizer.get_vocab(with_added_tokens=False).values()
    return TokenVocabulary(tuple(sorted(set(ids) - set(added))))
