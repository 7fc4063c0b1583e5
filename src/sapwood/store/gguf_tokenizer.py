"""The tokenizer in a GGUF file's metadata, as tokenizer.json and tokenizer_config.json.

A GGUF names its rule for cutting text into words ("tokenizer.ggml.pre"), since merges only mean
something together with it: "smollm" cuts every digit off, so that "  12" is "  ", "1", "2". A
converter that falls back to GPT-2's rule gives other tokens there than the model was trained on; so
the rules are a table here, and a name that is not in it is refused.

Sources  llama.cpp, the regular expressions per pre-tokenizer type in llama-vocab.cpp;
         Kudo 2018, arXiv:1808.06226, for the SentencePiece kind
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.processors import TemplateProcessing

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_header import GgufHeader

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Kinds of vocabulary entries in tokenizer.ggml.token_type."""

_SPACE = "\u2581"
"""SentencePiece's visible space."""

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_TAIL = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_QWEN2 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_LOWER, _UPPER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    rf"|\p{{N}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_QWEN35 = (
    rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?[\p{{L}}\p{{M}}]+|\p{{N}}"
    rf"| ?[^\s\p{{L}}\p{{M}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_GPT4O = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_TAIL}"
)
_NO_HAN_LOWER, _NO_HAN_UPPER = (f"{letters[:-1]}&&[^\\p{{Han}}]]" for letters in (_LOWER, _UPPER))
_KIMI = (
    rf"\p{{Han}}+|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_UPPER}*{_NO_HAN_LOWER}+{_CONTRACTIONS}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?{_NO_HAN_UPPER}+{_NO_HAN_LOWER}*{_CONTRACTIONS}?"
    rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_TAIL}"
)
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    rf"| ?[\p{{P}}\p{{S}}]+[\r\n]*|{_TAIL}"
)
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class WordRule:
    """How text is cut into pieces before the merges.

    splits         regular expressions, applied one after the other; every match is a piece
    ignore_merges  whether a piece that is a token of the vocabulary becomes that token at once
    add_bos        whether the text starts with BOS if the file does not say
    """

    splits: tuple[str, ...]
    ignore_merges: bool = False
    add_bos: bool = False


_DIGITS_THEN_GPT2 = WordRule(splits=(r"\p{N}", _GPT2))
_GPT2_RULE = WordRule(splits=(_GPT2,))
_LLAMA3_RULE = WordRule(splits=(_LLAMA3,), ignore_merges=True, add_bos=True)
_QWEN2_RULE = WordRule(splits=(_QWEN2,))

WORD_RULES: Mapping[str, WordRule] = {
    **dict.fromkeys(
        ("gpt-2", "gpt2", "phi-2", "mpt", "olmo", "jais", "trillion", "exaone4"), _GPT2_RULE
    ),
    **dict.fromkeys(
        ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b"),
        _DIGITS_THEN_GPT2,
    ),
    **dict.fromkeys(
        ("llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "lfm2", "pixtral"), _LLAMA3_RULE
    ),
    **dict.fromkeys(("dbrx", "smaug-bpe"), WordRule(splits=(_LLAMA3,))),
    **dict.fromkeys(("qwen2", "stablelm2", "deepseek-r1-qwen", "megrez", "hunyuan"), _QWEN2_RULE),
    "tekken": WordRule(splits=(_TEKKEN,), ignore_merges=True, add_bos=True),
    "qwen35": WordRule(splits=(_QWEN35,)),
    "kimi-k2": WordRule(splits=(_KIMI,)),
    "glm4": WordRule(splits=(_LLAMA3,), ignore_merges=True),
    **dict.fromkeys(("gpt-4o", "llama4", "minimax-m2"), WordRule(splits=(_GPT4O,))),
    **dict.fromkeys(("bailingmoe", "bailingmoe2"), WordRule(splits=(_BAILING,))),
    **dict.fromkeys(
        ("deepseek-v3", "hunyuan-dense"),
        WordRule(splits=(r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u30ff]+", _DEEPSEEK_V3)),
    ),
    "deepseek-coder": WordRule(
        splits=(r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥\u0800-一가-\ud7ff]+", r"\p{N}")
    ),
}


@dataclass(frozen=True, slots=True)
class _Vocabulary:
    """The contents of tokenizer.ggml.*; `tokens[i]` is spelled as in the model's merges."""

    path: Path
    values: Mapping[str, Any]

    def get(self, name: str, default: Any = None) -> Any:
        return self.values.get(f"tokenizer.ggml.{name}", default)

    @property
    def tokens(self) -> Sequence[str]:
        tokens = self.get("tokens")
        if not isinstance(tokens, list):
            raise self.error("it has no tokenizer.ggml.tokens")
        return tokens

    @property
    def kinds(self) -> Sequence[int]:
        return self.get("token_type") or [_NORMAL] * len(self.tokens)

    def special(self, name: str, default: int | None = None) -> str | None:
        """The token of tokenizer.ggml.NAME_token_id."""
        token_id = self.get(f"{name}_token_id", default)
        if token_id is None:
            return None
        if not 0 <= token_id < len(self.tokens):
            raise self.error(f"its {name} token is {token_id}, outside its vocabulary")
        return str(self.tokens[token_id])

    def error(self, what: str) -> ModelSourceError:
        return ModelSourceError(
            f"{self.path}: cannot make a tokenizer of it: {what}; put the model's own "
            f"tokenizer.json and tokenizer_config.json beside the file to use those"
        )


def has_tokenizer(header: GgufHeader) -> bool:
    """Whether the file has a vocabulary at all; a model without one is served by token ids."""
    return header.metadata.get("tokenizer.ggml.model") not in (None, "none", "no_vocab")


def build_tokenizer(header: GgufHeader) -> Tokenizer:
    """The tokenizer of a file. ModelSourceError for an unknown kind of tokenizer or word rule."""
    vocabulary = _Vocabulary(header.path, header.metadata)
    kind = vocabulary.get("model")
    # The tokenizers library raises plain Exception, so there is nothing narrower to catch.
    try:
        match kind:
            case "gpt2":
                tokenizer = _byte_level(vocabulary)
            case "llama":
                tokenizer = _sentencepiece(vocabulary)
            case _:
                raise vocabulary.error(f"its kind is {kind!r}, and only gpt2 and llama are known")
        _add_tokens(tokenizer, vocabulary)
        _surround(tokenizer, vocabulary)
    except ModelSourceError:
        raise
    except Exception as error:
        raise vocabulary.error(str(error)) from error
    return tokenizer


def tokenizer_config(header: GgufHeader) -> dict[str, Any]:
    """tokenizer_config.json; the chat template goes to a file of its own."""
    vocabulary = _Vocabulary(header.path, header.metadata)
    is_sentencepiece = vocabulary.get("model") == "llama"
    specials = {
        "bos_token": vocabulary.special("bos", 1 if is_sentencepiece else None),
        "eos_token": vocabulary.special("eos", 2 if is_sentencepiece else None),
        "unk_token": vocabulary.special("unknown", 0 if is_sentencepiece else None),
        "pad_token": vocabulary.special("padding"),
    }
    adds_bos, adds_eos = _surroundings(vocabulary)
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": adds_bos,
        "add_eos_token": adds_eos,
        "clean_up_tokenization_spaces": False,
        **{name: token for name, token in specials.items() if token is not None},
    }


def chat_templates(header: GgufHeader) -> dict[str, str]:
    """Jinja templates by name; "default" is the one without a name."""
    prefix = "tokenizer.chat_template"
    found = {
        key.removeprefix(prefix).removeprefix(".") or "default": value
        for key, value in header.metadata.items()
        if key == prefix or key.startswith(f"{prefix}.")
    }
    return {name: text for name, text in found.items() if isinstance(text, str)}


def _byte_level(vocabulary: _Vocabulary) -> Tokenizer:
    name = vocabulary.get("pre", "default")
    rule = WORD_RULES.get(name)
    if rule is None:
        raise vocabulary.error(
            f"its word rule tokenizer.ggml.pre is {name!r}; known: {', '.join(sorted(WORD_RULES))}"
        )
    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            merges=_merges(vocabulary),
            ignore_merges=rule.ignore_merges,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(split), "isolated") for split in rule.splits),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(vocabulary.get("add_space_prefix", False)), use_regex=False
            ),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _sentencepiece(vocabulary: _Vocabulary) -> Tokenizer:
    merges = _merges(vocabulary) if vocabulary.get("merges") else _merges_by_score(vocabulary)
    tokenizer = Tokenizer(
        BPE(
            vocab={token: token_id for token_id, token in enumerate(vocabulary.tokens)},
            merges=merges,
            unk_token=vocabulary.special("unknown", 0),
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    has_prefix = bool(vocabulary.get("add_space_prefix", True))
    # Every stretch of text between special tokens gets a space in front, as in llama.cpp.
    prepend = [normalizers.Prepend(_SPACE)] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prepend, normalizers.Replace(" ", _SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def _merges(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """The file's merges, best first. The first part may itself begin with a space."""
    pairs = []
    for merge in vocabulary.get("merges") or []:
        cut = merge.find(" ", 1)
        pairs.append((merge[:cut], merge[cut + 1 :]))
    return pairs


def _merges_by_score(vocabulary: _Vocabulary) -> list[tuple[str, str]]:
    """SentencePiece always merges the neighbours with the best score: as merges, the best first."""
    scores = vocabulary.get("scores")
    if not isinstance(scores, list) or len(scores) != len(vocabulary.tokens):
        raise vocabulary.error("it has neither merges nor one score per token")
    ids = {
        token: token_id
        for token_id, (token, kind) in enumerate(
            zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        )
        if kind == _NORMAL
    }
    found = []
    for token, token_id in ids.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in ids and right in ids:
                found.append((-scores[token_id], ids[left], ids[right], left, right))
    found.sort()
    return [(left, right) for *_, left, right in found]


def _add_tokens(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    """Add the tokens that are found in a text literally, before it is cut into pieces."""
    added = [
        AddedToken(token, normalized=False, special=kind != _USER_DEFINED)
        for token, kind in zip(vocabulary.tokens, vocabulary.kinds, strict=True)
        if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]
    tokenizer.add_tokens([token for token in added if not token.special])
    tokenizer.add_special_tokens([token for token in added if token.special])


def _surroundings(vocabulary: _Vocabulary) -> tuple[bool, bool]:
    """(whether encoding adds BOS, whether it adds EOS)."""
    rule = WORD_RULES.get(vocabulary.get("pre", "default"))
    default = vocabulary.get("model") == "llama" or (rule is not None and rule.add_bos)
    return bool(vocabulary.get("add_bos_token", default)), bool(
        vocabulary.get("add_eos_token", False)
    )


def _surround(tokenizer: Tokenizer, vocabulary: _Vocabulary) -> None:
    is_sentencepiece = vocabulary.get("model") == "llama"
    adds_bos, adds_eos = _surroundings(vocabulary)
    bos = vocabulary.special("bos", 1 if is_sentencepiece else None) if adds_bos else None
    eos = vocabulary.special("eos", 2 if is_sentencepiece else None) if adds_eos else None
    if bos is None and eos is None:
        return
    before, after = ([bos] if bos is not None else []), ([eos] if eos is not None else [])
    tokenizer.post_processor = TemplateProcessing(
        single=[*before, "$A", *after],
        pair=[*before, "$A", *after, *(f"{token}:1" for token in before), "$B:1"]
        + [f"{token}:1" for token in after],
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (*before, *after)],
    )
