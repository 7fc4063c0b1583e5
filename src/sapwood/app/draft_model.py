"""Finds the draft model that guesses tokens, and builds what runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sapwood.app.loading import refuse_absurd_size
from sapwood.app.model_defaults import checkpoint_dtype, read_json, reading
from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig, refuse_absurd_layers
from sapwood.models.registry import read_decoder
from sapwood.models.text_part import text_part
from sapwood.schema.cache import CacheGroup, CacheKind, shifted
from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.config.facts import MachineFacts, ModelFacts
from sapwood.schema.config.resolve import Decision, resolve_model
from sapwood.store import ModelFiles, Progress, fetch_model


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDraft:
    """A draft model before the configuration is resolved.

    asked  the configuration, with the draft model in the place of the model
    dtype  of the checkpoint
    """

    asked: EngineConfig
    files: ModelFiles
    shape: DecoderConfig
    dtype: str

    @property
    def num_bytes(self) -> int:
        """About what its weights will take."""
        if self.asked.model.load_format == "dummy":
            return self.shape.num_parameters * DTYPE_BYTES[self.dtype]
        return sum(path.stat().st_size for path in self.files.weights)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model, with everything that was decided about it.

    config  the engine's, with the draft model in the place of the model
    """

    config: ResolvedConfig
    files: ModelFiles
    shape: DecoderConfig

    def cache_groups(self, first_layer: int) -> tuple[CacheGroup, ...]:
        """What tokens leave behind in its layers, which are numbered from `first_layer` on."""
        return shifted(self.shape.cache_groups, first_layer)


def find_draft(
    asked: EngineConfig, target: ModelFiles, *, home: Path, progress: Progress | None
) -> FoundDraft | None:
    """The draft model that the options name; None if they name none.

    Raises ConfigError if it cannot be one."""
    options = asked.drafting
    if options.speculative_draft_model_path is None:
        return None
    model = replace(
        asked.model,
        model=options.speculative_draft_model_path,
        revision=options.speculative_draft_model_revision,
        load_format=options.speculative_draft_load_format or asked.model.load_format,
        quantization=options.speculative_draft_model_quantization,
        weight_dtype=None,
        model_checksum=None,
        model_impl="sapwood",
    )
    files = fetch_model(
        model.model,
        home=home,
        revision=model.revision,
        load_format=model.load_format,
        offline=model.offline,
        progress=progress,
    )
    path = files.path / "config.json"
    hf_config = read_json(path)
    with reading(path):
        refuse_absurd_layers(hf_config)
        shape = read_decoder(hf_config)
        dtype = checkpoint_dtype(dict(text_part(hf_config)))
    if model.load_format != "dummy":
        refuse_absurd_size(files, shape.num_parameters)
    if any(group.kind is CacheKind.STATE for group in shape.cache_groups):
        raise ConfigError(
            f"the draft model {files.name} has layers that keep a state, which cannot go back when "
            "a guess was wrong; choose a draft model whose layers are attention"
        )
    _refuse_other_vocabulary(files, target)
    return FoundDraft(asked=replace(asked, model=model), files=files, shape=shape, dtype=dtype)


def resolve_draft(
    found: FoundDraft,
    config: ResolvedConfig,
    target: DecoderConfig,
    machine: MachineFacts,
    facts: ModelFacts,
    decisions: list[Decision],
) -> Draft:
    """Make the open choices about a draft model; it computes in the model's data type.

    config  the model's
    facts   of the draft model
    """
    length = config.model.context_length
    if length > found.shape.max_context_length:
        raise ConfigError(
            f"requests may have {length} tokens, but the positions of the draft model "
            f"{found.files.name} reach {found.shape.max_context_length}; start with "
            f"--context-length {found.shape.max_context_length} or less"
        )
    shape = found.shape.for_context(length)
    if shape.switch_length != target.switch_length:
        raise ConfigError(
            f"the draft model {found.files.name} rotates long texts otherwise than the model, which"
            " is not implemented; choose another draft model"
        )
    own: list[Decision] = []
    asked = replace(found.asked.model, dtype=config.model.dtype, context_length=length)
    model = resolve_model(asked, config.execution, machine, facts, own)
    decisions += [
        replace(decision, option=f"draft model's {decision.option}")
        for decision in own
        if decision.option in ("quantization", "weight_dtype")
    ]
    return Draft(config=replace(config, model=model), files=found.files, shape=shape)


def _refuse_other_vocabulary(draft: ModelFiles, target: ModelFiles) -> None:
    """ConfigError if the same token ids mean different texts, as far as the files say."""
    own, others = (files.path / "tokenizer.json" for files in (draft, target))
    if not own.is_file() or not others.is_file():
        return
    content = own.read_bytes()
    if content == others.read_bytes():
        return
    ours, theirs = _vocabulary(own), _vocabulary(others)
    for token, token_id in ours.items():
        if theirs.get(token, token_id) != token_id:
            raise ConfigError(
                f"the draft model {draft.name} has another vocabulary than {target.name}: its "
                f"token {token_id} is {token!r}, which is token {theirs[token]} there; choose a "
                "draft model of the same family"
            )
    if len(theirs.keys() - ours.keys()) > len(theirs) // 100:
        raise ConfigError(
            f"the draft model {draft.name} lacks {len(theirs.keys() - ours.keys())} of the "
            f"{len(theirs)} tokens of {target.name}; choose a draft model of the same family"
        )


def _vocabulary(path: Path) -> Mapping[str, int]:
    """Text -> id of the tokens in a tokenizer.json."""
    with reading(path):
        content: dict[str, Any] = json.loads(path.read_bytes())
        vocabulary = content["model"]["vocab"]
        if isinstance(vocabulary, list):  # of a unigram model: pieces with their scores
            vocabulary = {piece: index for index, (piece, _) in enumerate(vocabulary)}
        added = {token["content"]: token["id"] for token in content.get("added_tokens") or []}
        return {**vocabulary, **added}
