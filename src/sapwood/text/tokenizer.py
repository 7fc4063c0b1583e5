"""Text to token ids and back, from a model's own files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers

from sapwood.base.errors import ConfigError, InvalidRequest, ModelSourceError
from sapwood.text.decoding import TokenTexts

TOKENIZER_FILE = "tokenizer.json"
CONFIG_FILE = "tokenizer_config.json"
SPECIAL_TOKENS_FILE = "special_tokens_map.json"
TEMPLATE_FILE = "chat_template.jinja"
TEMPLATE_JSON_FILE = "chat_template.json"
TEMPLATE_FOLDER = "additional_chat_templates"

_NAMED_TOKENS = (
    "bos_token",
    "eos_token",
    "unk_token",
    "sep_token",
    "pad_token",
    "cls_token",
    "mask_token",
)
_ADDED_TOKEN_FIELDS = {"content", "lstrip", "rstrip", "single_word", "normalized", "special"}


@dataclass(frozen=True, slots=True, kw_only=True)
class CutTokens:
    """Tokens at which the library cuts a text before it looks at anything else.

    Where several match at the same place, the longest counts.

    every       their texts
    boundaries  those after which the text may be cut for good: what follows is encoded as it would
                be after this token alone
    """

    every: frozenset[str]
    boundaries: frozenset[str]


class Tokenizer:
    """One model's tokenizer. Every method may be called from several threads at once.

    The post-processor in tokenizer.json decides whether `encode` adds BOS or EOS. Beside a
    tokenizer.json the options `add_bos_token` and `add_eos_token` of tokenizer_config.json are
    ignored, as in transformers 5. So is `clean_up_tokenization_spaces`, which would make the text
    of a token depend on the tokens after it.

    backend         an object of the `tokenizers` library; its truncation and padding are turned off
    special_tokens  role -> token, as templates know them: {"bos_token": "<s>", …}
    chat_templates  name -> jinja source; "default" is the model's usual one
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        *,
        special_tokens: Mapping[str, str] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        added = backend.get_added_tokens_decoder()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_templates = dict(chat_templates or {})
        self.special_token_ids = frozenset(
            token_id for token_id, token in added.items() if token.special
        )
        self.special_token_texts = frozenset(
            token.content for token in added.values() if token.special
        )
        # An id may lie beyond the count where added tokens leave a hole before them.
        count = backend.get_vocab_size(with_added_tokens=True)
        self.vocab_size = max(count, max(added, default=-1) + 1)
        self.texts = TokenTexts(backend, self.special_token_ids)

    @classmethod
    def from_directory(cls, directory: str | Path) -> Tokenizer:
        """Read tokenizer.json and the files beside it.

        Without a tokenizer.json, transformers converts older files (vocab.json and merges.txt,
        tokenizer.model, …), which takes longer. ModelSourceError if the files make no tokenizer.
        """
        directory = Path(directory)
        if not directory.is_dir():
            raise ModelSourceError(f"there is no directory {directory} to load a tokenizer from")
        config = _read_json(directory / CONFIG_FILE)
        templates = _chat_templates(directory, config)
        path = directory / TOKENIZER_FILE
        if not path.is_file():
            backend, special_tokens = _converted(directory)
            return cls(backend, special_tokens=special_tokens, chat_templates=templates)
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:
            raise ModelSourceError(
                f"{path} cannot be read by tokenizers {tokenizers.__version__} ({error}); "
                "the file is damaged or needs a newer version of the package"
            ) from error
        if "added_tokens_decoder" not in config:
            config = {**config, **_read_json(directory / SPECIAL_TOKENS_FILE)}
        _add_tokens(backend, config)
        return cls(backend, special_tokens=_special_tokens(config), chat_templates=templates)

    @property
    def chat_template(self) -> str | None:
        """The jinja source of the model's usual chat template."""
        return self.chat_templates.get("default")

    def template_named(self, name: str) -> str:
        """The jinja source of one of several chat templates; ConfigError if there is none such."""
        found = self.chat_templates.get(name)
        if found is None:
            known = ", ".join(sorted(self.chat_templates)) or "none"
            raise ConfigError(
                f"the tokenizer has no chat template {name!r} (--hf-chat-template-name); its "
                f"templates are: {known}"
            )
        return found

    @property
    def cut_tokens(self) -> CutTokens:
        added = [
            token
            for token in self._backend.get_added_tokens_decoder().values()
            if token.content and not token.normalized
        ]
        # A token that must be a whole word may be none. One with white space at its ends may be
        # swallowed by a neighbour that takes the space around itself.
        return CutTokens(
            every=frozenset(token.content for token in added),
            boundaries=frozenset(
                token.content
                for token in added
                if not token.single_word and token.content == token.content.strip()
            ),
        )

    @property
    def bos_token_id(self) -> int | None:
        return self._id_of("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        return self._id_of("eos_token")

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text. Takes about 0.25 s per million characters.

        The interpreter lock is free meanwhile: run a long text in a thread to keep an event loop
        going. InvalidRequest if the text has half of a surrogate pair.
        """
        [ids] = self.encode_batch([text], add_special_tokens)
        return ids

    def encode_batch(
        self, texts: Sequence[str], add_special_tokens: bool = True
    ) -> list[list[int]]:
        """The token ids of each of these texts, as `encode` gives them."""
        try:
            # The batch call frees the interpreter lock, which the single call does not, and leaves
            # out the character offsets, which nobody asked for.
            encodings = self._backend.encode_batch_fast(
                list(texts), add_special_tokens=add_special_tokens
            )
        except TypeError as error:
            raise InvalidRequest(
                "the text is not valid Unicode: it has half of a surrogate pair, which no UTF-8 "
                "text can have; send the whole character"
            ) from error
        return [encoding.ids for encoding in encodings]

    def encode_pair(self, first: str, second: str) -> tuple[list[int], int]:
        """The token ids of two texts as one, and how many of them belong to the first.

        InvalidRequest if a text has half of a surrogate pair.
        """
        try:
            # Not `encode_batch_fast`: without a post-processor its result does not say which of the
            # two texts a token belongs to.
            [encoding] = self._backend.encode_batch([(first, second)])
        except TypeError as error:
            raise InvalidRequest(
                "a text is not valid Unicode: it has half of a surrogate pair, which no UTF-8 "
                "text can have; send the whole character"
            ) from error
        return encoding.ids, encoding.type_ids.count(0)

    def decode(
        self,
        token_ids: Sequence[int],
        skip_special_tokens: bool = True,
        spaces_between_special_tokens: bool = True,
    ) -> str:
        """The text of token ids; ids that the tokenizer does not know are left out.

        spaces_between_special_tokens  whether neighbouring special tokens have a space in between.
                                       This matters only for decoders that put a space between all
                                       tokens (WordPiece, or no decoder)
        """
        gaps = spaces_between_special_tokens or skip_special_tokens
        if not gaps and self.texts.joins_with_space:
            return self.texts.without_gaps(token_ids)
        return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)

    def token_id(self, token: str) -> int | None:
        """The id of the token of exactly that text; None: there is none."""
        return self._backend.token_to_id(token)

    def _id_of(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


def _read_json(path: Path) -> dict[str, Any]:
    """The object in that file; empty if there is no file."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{path} is not valid JSON ({error}); fetch it again") from error
    if not isinstance(value, dict):
        raise ModelSourceError(f"{path} must hold a JSON object, not a {type(value).__name__}")
    return value


def _content_of(token: object) -> str | None:
    """A token as the files spell it: a string, or an object with its content."""
    if isinstance(token, str):
        return token
    if isinstance(token, dict) and isinstance(token.get("content"), str):
        return str(token["content"])
    return None


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    """Special tokens by their role: each `*_token` of the config, and `extra_special_tokens`."""
    named = {key: value for key, value in config.items() if key.endswith("_token")}
    extra = config.get("extra_special_tokens")
    if isinstance(extra, dict):
        named.update(extra)
    contents = {key: _content_of(value) for key, value in named.items()}
    return {key: content for key, content in contents.items() if content is not None}


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any]) -> None:
    """Add the tokens that only tokenizer_config.json has, in the same order as transformers."""
    known = {repr(token) for token in backend.get_added_tokens_decoder().values()}
    declared = config.get("added_tokens_decoder") or {}
    for _, fields in sorted(declared.items(), key=lambda item: int(item[0])):
        token = tokenizers.AddedToken(
            **{key: value for key, value in fields.items() if key in _ADDED_TOKEN_FIELDS}
        )
        if repr(token) not in known:
            backend.add_tokens([token])
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    special = _special_tokens(config)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    ordered = [special[role] for role in _NAMED_TOKENS if role in special]
    ordered += [content for role, content in special.items() if role not in _NAMED_TOKENS]
    ordered += [content for token in extra if (content := _content_of(token)) is not None]
    for content in ordered:
        if content not in contents:
            backend.add_special_tokens([content])
            contents.add(content)


def _chat_templates(directory: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Chat templates by name; a template in a file of its own replaces the config's."""
    templates: dict[str, str] = {}
    if (directory / TEMPLATE_FILE).is_file():
        templates["default"] = (directory / TEMPLATE_FILE).read_text(encoding="utf-8")
    for path in sorted((directory / TEMPLATE_FOLDER).glob("*.jinja")):
        templates[path.stem] = path.read_text(encoding="utf-8")
    if templates:
        return templates
    declared = config.get("chat_template")
    if declared is None:
        declared = _read_json(directory / TEMPLATE_JSON_FILE).get("chat_template")
    if isinstance(declared, str):
        return {"default": declared}
    if isinstance(declared, dict):
        return {str(name): str(source) for name, source in declared.items()}
    if isinstance(declared, list):
        try:
            return {str(entry["name"]): str(entry["template"]) for entry in declared}
        except (TypeError, KeyError) as error:
            raise ModelSourceError(
                f"chat_template in {directory / CONFIG_FILE} is a list, but an entry of it has no "
                "name and template; correct the file or start with --chat-template"
            ) from error
    return {}


def _converted(directory: Path) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer and special tokens that transformers makes from files of older formats."""
    try:
        # Imported here because it takes a second, which a directory with a tokenizer.json need not
        # pay. A gateway may be installed without it.
        from transformers import AutoTokenizer
    except ImportError as error:
        raise ModelSourceError(
            f"{directory} has no {TOKENIZER_FILE}, and the package transformers, which converts "
            "older files, is not installed; give a directory that has one"
        ) from error

    try:
        # Without trust_remote_code=False transformers would ask on the terminal.
        loaded = AutoTokenizer.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:
        raise ModelSourceError(
            f"{directory} has no {TOKENIZER_FILE}, and transformers cannot make a tokenizer of its "
            f"other files ({error}); give a directory that has one with --tokenizer-path"
        ) from error
    backend = getattr(loaded, "backend_tokenizer", None)
    if not isinstance(backend, tokenizers.Tokenizer):
        raise ModelSourceError(
            f"{directory} has no {TOKENIZER_FILE}, and its {type(loaded).__name__} cannot be "
            "converted to one; give a directory that has one with --tokenizer-path"
        )
    return backend, dict(loaded.special_tokens_map)
