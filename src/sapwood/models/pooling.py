"""Whether a model makes embeddings or scores, and how, as its files say. No torch.

Beside config.json there may be the files of sentence-transformers: modules.json names the parts
after the model, of which pooling and normalisation are known here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.models.encoder.names import ENCODERS
from sapwood.schema.pooling import METHODS, Method, Pooling

HEAD = "ForSequenceClassification"

GENERATING = frozenset(
    {"AquilaModel", "ChatGLMModel", "GPT2LMHeadModel", "InternVLChatModel", "QWenLMHeadModel"}
)
"""Architectures that generate although their names end like those without an output layer."""

_MODES = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}
"""How a sentence-transformers pooling names the methods that are known here."""

_METHOD_NAMES = {"cls": "cls", "mean": "mean", "lasttoken": "last"}
"""The same, in files of its newer versions."""


def pooling_of(
    config: Mapping[str, Any], directory: Path, *, is_embedding: bool, method: str | None
) -> Pooling | None:
    """How the model makes embeddings or scores; None for a model that generates.

    config        config.json, which lies in `directory` with the other files
    is_embedding  whether a model that could generate must make embeddings instead
    method        the wanted pooling method; None: the model's own
    Raises        ConfigError if that is impossible, or if the model has parts that are not known
    """
    architecture = str(next(iter(config.get("architectures") or []), ""))
    has_head = architecture.endswith(HEAD)
    is_encoder = architecture in ENCODERS
    # A decoder that was saved without its output layer ("Qwen3Model") cannot generate.
    is_headless = architecture.endswith("Model") and architecture not in GENERATING
    if not (is_embedding or has_head or is_encoder or is_headless):
        if method is not None:
            raise ConfigError(
                f"--pooling-method {method} is for models that make embeddings, and "
                f"{architecture or 'this model'} generates; add --is-embedding"
            )
        return None
    decoder = None if is_encoder else _decoder(architecture)
    if decoder is not None:
        _refuse_bidirectional(config, decoder)
    if has_head:
        return _classifier(config, decoder, method)
    return _embedder(config, directory, decoder, method)


def _decoder(architecture: str) -> str:
    """The architecture with the same layers that generates."""
    if architecture in GENERATING:
        return architecture
    for suffix in (HEAD, "Model"):
        if architecture.endswith(suffix):
            return f"{architecture.removesuffix(suffix)}ForCausalLM"
    return architecture


def _refuse_bidirectional(config: Mapping[str, Any], decoder: str) -> None:
    if config.get("is_causal") is False or config.get("use_bidirectional_attention"):
        raise ConfigError(
            f"the tokens of this model attend to later ones, which is not implemented for {decoder}"
        )


def _classifier(config: Mapping[str, Any], decoder: str | None, method: str | None) -> Pooling:
    own: Method = "cls" if decoder is None else "last"
    if method not in (None, own):
        raise ConfigError(
            f"--pooling-method is {method}, but the classification head of this model was trained "
            f"on {own}; leave the option out"
        )
    named = config.get("id2label") or {}
    count = len(named) or int(config.get("num_labels") or 2)
    labels = tuple(str(named.get(str(i), named.get(i, f"LABEL_{i}"))) for i in range(count))
    return Pooling(
        task="classify",
        method=own,
        why="what classification heads are trained on",
        size=_hidden_size(config),
        normalize=False,
        decoder=decoder,
        labels=labels,
        squashes=_squashes(config),
        multi_label=config.get("problem_type") == "multi_label_classification",
    )


def _hidden_size(config: Mapping[str, Any]) -> int:
    """Of the states that are pooled; a model that sees has a config for its text part."""
    text = config.get("text_config") or {}
    return int(config.get("hidden_size") or text.get("hidden_size") or 0)


def _squashes(config: Mapping[str, Any]) -> bool:
    """Whether a score is a sigmoid, as in the cross-encoders of sentence-transformers."""
    newer = config.get("sentence_transformers") or {}
    named = newer.get("activation_fn") or config.get("sbert_ce_default_activation_function")
    if named is None or str(named).endswith("Sigmoid"):
        return True
    if str(named).endswith("Identity"):
        return False
    raise ConfigError(
        f"the model's scores go through {named}, which is not implemented; known: Sigmoid, Identity"
    )


def _embedder(
    config: Mapping[str, Any], directory: Path, decoder: str | None, method: str | None
) -> Pooling:
    modules = _read(directory / "modules.json")
    own, why = _own_method(directory, modules, decoder)
    if method is not None:
        own, why = cast(Method, method), "asked for"
    if own == "cls" and decoder is not None:
        raise ConfigError(
            "pooling cls takes the first token, which knows nothing of the others in a decoder; "
            "use --pooling-method last or mean"
        )
    said = _read(directory / "sentence_bert_config.json") or {}
    length = said.get("max_seq_length")
    return Pooling(
        task="embed",
        method=own,
        why=why,
        size=_hidden_size(config),
        # Without a modules.json, embeddings have length 1, like those of every embedding API.
        normalize=modules is None or "Normalize" in _kinds(modules, directory),
        decoder=decoder,
        max_tokens=length if isinstance(length, int) and length > 0 else None,
    )


def _own_method(directory: Path, modules: Any, decoder: str | None) -> tuple[Method, str]:
    if modules is None:
        if decoder is None:
            return "mean", "what encoders without a modules.json are used with"
        return "last", "the only token of a decoder that has seen all others"
    for module, kind in zip(modules, _kinds(modules, directory), strict=True):
        if kind == "Pooling":
            path = directory / str(module.get("path", "")) / "config.json"
            return _method(_read(path) or {}, path), f"{path.parent.name}/config.json says so"
    raise ConfigError(
        f"{directory}/modules.json has no pooling; remove the file, or choose another model"
    )


def _kinds(modules: Any, directory: Path) -> list[str]:
    """The last word of each module's type; ConfigError if one is not known."""
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelSourceError(f"{directory}/modules.json must hold a list of objects")
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = [kind for kind in kinds if kind not in ("Transformer", "Pooling", "Normalize")]
    if unknown:
        raise ConfigError(
            f"the model has a module {unknown[0]} after its layers ({directory}/modules.json), "
            "which is not implemented; known: Transformer, Pooling, Normalize"
        )
    return kinds


def _method(said: Mapping[str, Any], path: Path) -> Method:
    modes = [name for name, on in said.items() if name.startswith("pooling_mode_") and on is True]
    known = [_MODES[name] for name in modes if name in _MODES]
    if not modes and "pooling_mode" in said:
        modes = [str(said["pooling_mode"])]
        known = [_METHOD_NAMES[name] for name in modes if name in _METHOD_NAMES]
    if len(modes) != 1 or not known:
        raise ConfigError(
            f"{path} asks for {' and '.join(modes) or 'no pooling'}, which is not implemented; "
            f"known: {', '.join(METHODS)}; choose one with --pooling-method"
        )
    return cast(Method, known[0])


def _read(path: Path) -> Any:
    """The JSON in a file; None if there is no such file."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise ModelSourceError(f"{path} is not valid JSON: {error}") from error
