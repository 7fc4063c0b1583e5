"""The facts of a model that transformers computes, found by running it without data.

On torch's device "meta" tensors have shapes and no numbers, so that a whole model is built and run
in a second, however large it is. What each layer asks of its attention says what it keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sapwood.base.errors import ConfigError
from sapwood.layers.rope_config import DEFAULT_THETA, RopeConfig
from sapwood.models.config import FULL, SLIDING, DecoderConfig, architecture_of
from sapwood.models.foreign.attention import NAME, Call, attach, register
from sapwood.models.foreign.head import OutputLayer

_NUM_TOKENS = 2
"""Of the run without data: more than one, so that a model cannot take it for a decode."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignConfig(DecoderConfig):
    """A decoder that transformers computes.

    known_parameters  weights, counted once where they are tied
    runs_code         whether its modelling is Python code that came with the checkpoint
    """

    known_parameters: int
    runs_code: bool = False

    @property
    def num_parameters(self) -> int:
        return self.known_parameters


def read_foreign(
    directory: Path, hf: Mapping[str, Any], *, trust_remote_code: bool
) -> ForeignConfig:
    """The facts of the model in a directory; ConfigError, with the reason, if it cannot be served.

    trust_remote_code  whether Python code in the directory may be run"""
    name = architecture_of(hf)
    with _refusing(name):
        return _read(directory, hf, name, trust_remote_code)


def _read(
    directory: Path, hf: Mapping[str, Any], name: str, trust_remote_code: bool
) -> ForeignConfig:
    found = class_and_config(directory, hf, trust_remote_code=trust_remote_code)
    architecture, config, runs_code = found
    _refuse_kinds(architecture, config)
    model = without_data(architecture, config)
    convolutions = [type(one).__name__ for one in model.modules() if isinstance(one, _CONVOLUTIONS)]
    if convolutions:
        raise ConfigError(f"it has a {convolutions[0]}, which would mix the tokens of requests")
    calls = _calls(model, config.num_hidden_layers)
    windows = {call.layer: call.window for call in calls if call.window is not None}
    _refuse_differences(calls, windows, getattr(config, "layer_types", None))
    first, context_length = calls[0], _context_length(config)
    return ForeignConfig(
        architecture=name,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=getattr(config, "intermediate_size", None) or config.hidden_size,
        num_layers=len(calls),
        num_heads=first.num_heads,
        num_kv_heads=first.num_kv_heads,
        head_dim=first.head_dim,
        norm_eps=1e-6,
        rope=RopeConfig(theta=DEFAULT_THETA, trained_length=context_length),
        context_length=context_length,
        sliding_window=next(iter(windows.values()), None),
        windowed_layers=tuple(windows),
        soft_cap=first.soft_cap,
        has_sinks=any(call.sinks is not None for call in calls),
        known_parameters=sum(one.numel() for one in model.parameters()),
        runs_code=runs_code,
        hf=hf,
    )


_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@contextmanager
def _refusing(name: str) -> Iterator[None]:
    """Says beside every reason which model it is about, and the way out."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(
            f"transformers cannot compute {name} over a paged KV cache: {error.message}. Choose a "
            "model of `sapwood models`, or install a package that adds the architecture (the entry "
            "point sapwood.architectures, see ARCHITECTURE.md)"
        ) from error


def class_and_config(
    directory: Path, hf: Mapping[str, Any], *, trust_remote_code: bool
) -> tuple[Any, Any, bool]:
    """(transformers' class, its configuration, whether the class is code beside the checkpoint);
    ConfigError if there is no such class."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as KNOWN

    name, kind = architecture_of(hf), hf.get("model_type")
    named = KNOWN.get(kind, ()) if isinstance(kind, str) else ()
    is_known = name in (named if isinstance(named, tuple | list) else (named,))
    code = (hf.get("auto_map") or {}).get("AutoModelForCausalLM")
    if not is_known and code is None:
        raise ConfigError(
            f"transformers {transformers.__version__} has no language model of that name and of "
            f"the model_type {kind!r}"
        )
    if not is_known and not trust_remote_code:
        raise ConfigError(
            "it is Python code that came with the checkpoint (auto_map), which runs with all "
            "rights of this process, and only if --trust-remote-code asks for it"
        )
    try:
        config = transformers.AutoConfig.from_pretrained(
            str(directory), local_files_only=True, trust_remote_code=not is_known
        )
        if is_known:
            return getattr(transformers, name), config, False
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        found = get_class_from_dynamic_module(str(code), str(directory), local_files_only=True)
    except (ImportError, OSError, ValueError, AttributeError) as error:
        raise ConfigError(f"it could not be imported: {error}") from error
    return found, config, True


def without_data(architecture: Any, config: Any) -> Any:
    """The model on the device "meta", with our attention; ConfigError if it cannot be built."""
    register()
    try:
        with torch.device("meta"):
            # All experts at once: a loop over those that are chosen needs data.
            return architecture._from_config(
                config, attn_implementation=NAME, experts_implementation="batched_mm"
            ).eval()
    except Exception as error:
        raise ConfigError(f"it cannot be built: {type(error).__name__}: {error}") from error


def _refuse_kinds(architecture: Any, config: Any) -> None:
    """Raises ConfigError for kinds of models that could not work."""
    if config.is_encoder_decoder:
        raise ConfigError("it is an encoder with a decoder, and sapwood has no cross attention")
    if config.get_text_config() is not config:
        raise ConfigError("it takes more than text (images or sound), which is not implemented")
    if getattr(architecture, "_is_stateful", False):
        raise ConfigError("its layers keep states of their own kind instead of keys and values")
    if not getattr(architecture, "_supports_attention_backend", False):
        raise ConfigError("its layers do not call transformers' attention interface")
    kinds = set(getattr(config, "layer_types", None) or ()) - {FULL, SLIDING}
    if kinds:
        raise ConfigError(f"it has layers of the kind {', '.join(sorted(map(str, kinds)))}")


def _calls(model: Any, num_layers: int) -> list[Call]:
    """What each layer asks of its attention, by layer; ConfigError if there are others."""
    calls: dict[int, Call] = {}

    def note(call: Call, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if call.layer in calls:
            raise ConfigError(f"layer {call.layer} calls attention more than once")
        calls[call.layer] = call
        return query.new_empty(1, query.shape[2], call.num_heads, call.value_dim)

    attach(model, note)
    tokens = torch.zeros(1, _NUM_TOKENS, dtype=torch.int64, device="meta")
    try:
        with torch.inference_mode():
            output = model.base_model(input_ids=tokens, position_ids=tokens, use_cache=False)
            logits = OutputLayer(model)(output.last_hidden_state[0])
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"it does not run on a row of tokens: {type(error).__name__}: {error}"
        ) from error
    if logits.shape != (_NUM_TOKENS, model.config.vocab_size):
        raise ConfigError(f"it makes logits of the shape {list(logits.shape)}")
    if sorted(calls) != list(range(num_layers)):
        raise ConfigError(
            f"attention is called by {len(calls)} of its {num_layers} layers; the others keep "
            "something else, or nothing"
        )
    return [calls[layer] for layer in range(num_layers)]


def _refuse_differences(
    calls: Sequence[Call], windows: Mapping[int, int], kinds: Sequence[str] | None
) -> None:
    """Raises ConfigError unless all layers keep the same, but for one window."""
    found: dict[str, set[Any]] = {
        "heads": {(call.num_heads, call.num_kv_heads) for call in calls},
        "sizes of heads": {call.head_dim for call in calls},
        "windows": set(windows.values()),
        "soft caps": {call.soft_cap for call in calls},
    }
    for what, values in found.items():
        if len(values) > 1:
            raise ConfigError(f"its layers have different {what}")
    said = {layer for layer, kind in enumerate(kinds or ()) if kind == SLIDING}
    if kinds is not None and not said.issuperset(windows):
        raise ConfigError("layers pass a window to attention that have none in layer_types")
    if said - set(windows):
        raise ConfigError(f"layer {min(said - set(windows))} does not pass its window to attention")


def _context_length(config: Any) -> int:
    """Positions that the model reaches, whatever the other requests of a step."""
    length = getattr(config, "max_position_embeddings", None)
    if not isinstance(length, int):
        raise ConfigError("its config.json has no max_position_embeddings")
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    # Beyond this, transformers rotates by the longest text of a step, also the shorter ones.
    originals = [
        part.get("original_max_position_embeddings", length)
        for part in parts
        if part.get("rope_type") in ("dynamic", "longrope")
    ]
    return int(min([length, *originals]))
