"""Finds the draft model that guesses tokens, and builds what runs it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from enum import Enum, auto
from pathlib import Path
from typing import Any

from sapwood.app.building.loading import refuse_absurd_size
from sapwood.app.building.model_defaults import checkpoint_dtype, read_json, reading
from sapwood.app.building.token_map import read_token_map
from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.models.config import DecoderConfig, architecture_of, refuse_absurd_layers
from sapwood.models.drafts.eagle import EAGLE, EAGLE3, read_eagle
from sapwood.models.registry import decoder_class, read_decoder
from sapwood.models.text_part import text_part
from sapwood.schema.cache import CacheGroup, CacheKind, shifted
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.drafting import HEAD_ALGORITHMS, MODEL_ALGORITHMS, OWN_ALGORITHMS
from sapwood.schema.config.engine import EngineConfig, ResolvedConfig
from sapwood.schema.config.facts import MachineFacts, ModelFacts
from sapwood.schema.config.resolve import resolve_model
from sapwood.store import ModelFiles, Progress, fetch_model


class DraftKind(Enum):
    """What guesses.

    MODEL   a whole language model
    EAGLE, EAGLE3  a head of that kind, which goes on from the model's hidden states
    OWN     the layer by which the model's own checkpoint predicts further tokens
    """

    MODEL = auto()
    EAGLE = auto()
    EAGLE3 = auto()
    OWN = auto()


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundDraft:
    """A draft model before the configuration is resolved.

    asked  the configuration, with the draft model in the place of the model
    shape  its sizes; of OWN those of the model with that layer as its last
    dtype  of the checkpoint
    num_bytes  about what its weights will take
    hot_ids  the only tokens that a head guesses; empty: it guesses all
    has_several  of OWN, whether each guess has a layer of its own
    """

    kind: DraftKind
    asked: EngineConfig
    files: ModelFiles
    shape: DecoderConfig
    dtype: str
    num_bytes: int
    hot_ids: tuple[int, ...] = ()
    has_several: bool = False

    def cache_groups(self, target: DecoderConfig, context_length: int) -> tuple[CacheGroup, ...]:
        """What tokens leave behind in its layers, which come after those of the model."""
        shape = replace(self.shape, context_length=context_length)
        return _cache_groups(self.kind, shape, target.num_caches, has_several=self.has_several)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft model, with everything that was decided about it.

    config  the engine's, with the draft model in the place of the model
    shape, hot_ids, has_several  as in FoundDraft
    """

    kind: DraftKind
    config: ResolvedConfig
    files: ModelFiles
    shape: DecoderConfig
    hot_ids: tuple[int, ...] = ()
    has_several: bool = False

    def first_layer(self, target: DecoderConfig) -> int:
        """The number by which its layers know the first of them."""
        return target.num_caches if self.kind is DraftKind.OWN else 0

    def cache_groups(self, target: DecoderConfig) -> tuple[CacheGroup, ...]:
        """What tokens leave behind in its layers, which come after those of the model."""
        return _cache_groups(self.kind, self.shape, target.num_caches, has_several=self.has_several)


def _cache_groups(
    kind: DraftKind, shape: DecoderConfig, num_caches: int, *, has_several: bool
) -> tuple[CacheGroup, ...]:
    if kind is not DraftKind.OWN:
        return shifted(shape.cache_groups, num_caches)
    groups = []
    for group in shape.cache_groups:
        layers = tuple(layer for layer in group.layers if layer >= num_caches)
        window = group.window
        if window is not None and has_several:
            # The layers after the first one compute places that are some way behind the model's,
            # and what these places see must still be there.
            window += len(layers) - 1
        if layers:
            groups.append(replace(group, layers=layers, window=window))
    return tuple(groups)


def find_draft(
    asked: EngineConfig,
    files: ModelFiles,
    target: DecoderConfig,
    *,
    home: Path,
    progress: Progress | None,
) -> FoundDraft | None:
    """The draft model that the options name; None if they name none.

    files, target  of the model
    Raises         ConfigError if it cannot be one"""
    algorithm = asked.speculation.speculative_algorithm
    path = asked.drafting.speculative_draft_model_path
    if algorithm not in MODEL_ALGORITHMS:
        return None
    if algorithm in HEAD_ALGORITHMS and asked.model.model_impl == "transformers":
        raise ConfigError(
            f"--speculative-algorithm {algorithm} takes states from inside of a model, but the "
            "transformers library computes this one; leave it out, or use STANDALONE"
        )
    found: FoundDraft | None
    if path is None or (algorithm in OWN_ALGORITHMS and path == asked.model.model):
        found = _own_layer(asked, files, target, str(algorithm))
    else:
        found = _other_model(asked, files, target, path, home=home, progress=progress)
    if any(
        group.kind is CacheKind.STATE
        for group in found.cache_groups(target, found.shape.context_length)
    ):
        raise ConfigError(
            f"the draft model {found.files.name} has layers that keep a state, which cannot go back"
            " when a guess was wrong; choose a draft model whose layers are attention"
        )
    return replace(found, hot_ids=_hot_ids(asked, target))


def _hot_ids(asked: EngineConfig, target: DecoderConfig) -> tuple[int, ...]:
    path, algorithm = asked.drafting.speculative_token_map, asked.speculation.speculative_algorithm
    if path is None:
        return ()
    if algorithm not in OWN_ALGORITHMS:
        raise ConfigError(
            f"--speculative-token-map is for heads of {' and '.join(OWN_ALGORITHMS)}, not for "
            f"--speculative-algorithm {algorithm}; leave it out"
        )
    return read_token_map(Path(path).expanduser(), target.vocab_size)


def _own_layer(
    asked: EngineConfig, files: ModelFiles, target: DecoderConfig, algorithm: str
) -> FoundDraft:
    architecture = decoder_class(target.architecture)
    if algorithm not in OWN_ALGORITHMS:
        raise ConfigError(
            f"--speculative-algorithm {algorithm} guesses with a draft model; name one with "
            "--speculative-draft-model-path"
        )
    given = asked.drafting.given_of_other_model
    if given:
        raise ConfigError(
            f"{', '.join(given)} is about a draft model, but without --speculative-draft-model-path"
            " the model's own layers guess; leave it out"
        )
    has_several = asked.drafting.enable_multi_layer_eagle
    find = architecture.with_predictors if has_several else architecture.with_predictor
    shape = find(target)
    assert target.num_caches == target.num_layers * target.attentions_per_layer, (
        "the layer's number is that of its cache"
    )
    if shape is None and has_several:
        raise ConfigError(
            f"the checkpoint of {files.name} ({target.architecture}) has no layer of its own for "
            "each guess, or sapwood does not know them; leave out --enable-multi-layer-eagle"
        )
    if shape is None:
        raise ConfigError(
            f"the checkpoint of {files.name} ({target.architecture}) has no layer that predicts "
            "further tokens, or sapwood does not know it; name a draft head with "
            "--speculative-draft-model-path"
        )
    steps, count = asked.drafting.speculative_num_steps, shape.num_layers - target.num_layers
    if has_several and (steps or 0) > count:
        raise ConfigError(
            f"--speculative-num-steps is {steps}, but the checkpoint of {files.name} has {count} "
            f"layers that each make one guess; ask for {count} or less"
        )
    dtype = checkpoint_dtype(dict(target.hf))
    return FoundDraft(
        has_several=has_several,
        kind=DraftKind.OWN,
        asked=asked,
        files=files,
        shape=shape,
        dtype=dtype,
        num_bytes=(shape.num_parameters - target.num_parameters) * DTYPE_BYTES[dtype],
    )


def _other_model(
    asked: EngineConfig,
    target_files: ModelFiles,
    target: DecoderConfig,
    name: str,
    *,
    home: Path,
    progress: Progress | None,
) -> FoundDraft:
    options, algorithm = asked.drafting, asked.speculation.speculative_algorithm
    if options.enable_multi_layer_eagle:
        raise ConfigError(
            "--enable-multi-layer-eagle is about layers of the model's own checkpoint; leave it out"
            " or use EAGLE without --speculative-draft-model-path"
        )
    model = replace(
        asked.model,
        model=name,
        revision=options.speculative_draft_model_revision,
        load_format=options.speculative_draft_load_format or asked.model.load_format,
        quantization=options.speculative_draft_model_quantization,
        weight_dtype=None,
        model_checksum=None,
        model_impl="sapwood",
    )
    files = fetch_model(
        name,
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
        kind = _kind_of(str(algorithm), architecture_of(dict(text_part(hf_config))), files)
        if kind is DraftKind.MODEL:
            shape = read_decoder(hf_config)
        else:
            shape = read_eagle(hf_config, target)
        dtype = checkpoint_dtype(dict(text_part(hf_config)))
    num_parameters = shape.num_parameters
    if kind is DraftKind.MODEL:
        _refuse_other_vocabulary(files, target_files)
    else:
        num_parameters -= 2 * shape.vocab_size * shape.hidden_size
    if model.load_format == "dummy":
        num_bytes = num_parameters * DTYPE_BYTES[dtype]
    else:
        refuse_absurd_size(files, num_parameters)
        num_bytes = sum(one.stat().st_size for one in files.weights)
    return FoundDraft(
        kind=kind,
        asked=replace(asked, model=model),
        files=files,
        shape=shape,
        dtype=dtype,
        num_bytes=num_bytes,
    )


def _kind_of(algorithm: str, architecture: str, files: ModelFiles) -> DraftKind:
    """ConfigError if such a draft model does not go with the algorithm."""
    heads = {EAGLE: DraftKind.EAGLE, EAGLE3: DraftKind.EAGLE3}
    kind = heads.get(architecture, DraftKind.MODEL)
    wanted = {"STANDALONE": DraftKind.MODEL, "EAGLE3": DraftKind.EAGLE3}
    if kind is wanted.get(algorithm, DraftKind.EAGLE):
        return kind
    fitting = {
        DraftKind.MODEL: "STANDALONE, or if the model's own layers shall guess, EAGLE without "
        "--speculative-draft-model-path",
        DraftKind.EAGLE: "EAGLE",
        DraftKind.EAGLE3: "EAGLE3",
    }
    raise ConfigError(
        f"the draft model {files.name} is a {architecture}, which does not go with "
        f"--speculative-algorithm {algorithm}; use {fitting[kind]}"
    )


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
    if found.kind is DraftKind.OWN:
        return Draft(
            kind=found.kind,
            config=config,
            files=found.files,
            shape=shape,
            hot_ids=found.hot_ids,
            has_several=found.has_several,
        )
    own: list[Decision] = []
    asked = replace(found.asked.model, dtype=config.model.dtype, context_length=length)
    model = resolve_model(asked, config.execution, machine, facts, own)
    decisions += [
        replace(decision, option=f"draft model's {decision.option}")
        for decision in own
        if decision.option in ("quantization", "weight_dtype")
    ]
    draft_config = replace(config, model=model)
    return Draft(
        kind=found.kind,
        config=draft_config,
        files=found.files,
        shape=shape,
        hot_ids=found.hot_ids,
    )


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
