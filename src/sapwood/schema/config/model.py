"""Which model is served, and how it is read."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from sapwood.base.dtypes import DTYPE_BYTES
from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.sampling import DEFAULTABLE

LOAD_FORMATS = ("auto", "safetensors", "gguf", "pt", "dummy")
SAMPLING_DEFAULTS = ("model", "openai")
POOLING_METHODS = ("last", "mean", "cls")
UNKNOWN_TOOL_CALLS = ("content", "call")
ON_THE_FLY = ("w8a8_int8", "w4a8", "w8a16", "fp8")
"""Quantisations of any checkpoint, while it loads."""
CHECKPOINT_FORMATS = (
    "awq",
    "bitsandbytes",
    "compressed-tensors",
    "fp8",
    "gptq",
    "modelopt",
    "mxfp4",
)
"""Formats that other tools write. The option is never needed for them: config.json names them."""
MODEL_IMPLS = ("auto", "sapwood", "transformers")
GGUF_BLOCKS = ("gguf", "gguf_a8")
"""A GGUF file's own blocks: with activations of 16 bits, and of 8."""
QUANTIZATIONS = tuple(dict.fromkeys(("none", *ON_THE_FLY, *GGUF_BLOCKS, *CHECKPOINT_FORMATS)))


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = option(
        "default",
        "Catalogue name, hub repository id (owner/name), or path of a model; default: "
        "qwen2.5-coder-0.5b, or smollm2-135m where memory, disk or network do not allow that.",
        aliases=["model-path"],
    )
    revision: str | None = option(None, "Branch, tag or commit of the hub repository.")
    tokenizer_path: str | None = option(
        None, "Directory with the tokenizer, if it is not the model's own."
    )
    skip_tokenizer_init: bool = option(
        False,
        "Read no tokenizer: requests bring input_ids, answers have output_ids and no text. Texts, "
        "chats, stop strings and grammars are refused.",
    )
    served_model_name: str | None = option(
        None, "Name that the API shows and accepts; default: the model's."
    )
    weight_version: str = option(
        "default", "Name of the weights of the start, which answers tell in meta_info."
    )
    chat_template: str | None = option(
        None, "Chat template: a file, a built-in name, or jinja text; default: the model's own."
    )
    hf_chat_template_name: str | None = option(
        None,
        "Name of one of the tokenizer's chat templates, where it has several; default: the one "
        "named default.",
    )
    multi_item_scoring_delimiter: int | None = option(
        None,
        "Id of a token that /v1/score puts between a query and each of its items; default: none.",
    )
    mmproj: str | None = option(
        None,
        "With a GGUF file of a text model: the GGUF file of its tower and projector; none: serve "
        "the text alone. Default: the file beside the model whose name begins with mmproj, if "
        "there is one.",
    )
    load_format: str = option(
        "auto",
        "Format of the weights; dummy: random weights of the configured shape.",
        choices=LOAD_FORMATS,
    )
    model_impl: str = option(
        "auto",
        "Who computes the layers: sapwood, its own classes (`sapwood models`); transformers, the "
        "modelling of that library over sapwood's KV cache, which is slower; auto: sapwood for the "
        "architectures that it has, transformers for others.",
        choices=MODEL_IMPLS,
    )
    dtype: str = option(
        "auto",
        "Data type of activations and, unless --weight-dtype and --kv-cache-dtype say otherwise, "
        "of weights and KV cache.",
        choices=("auto", *DTYPE_BYTES),
    )
    weight_dtype: str | None = option(
        None,
        "Data type in which weights that are not quantised are kept, the same as --dtype or, on a "
        "CPU with float32 activations, one of 16 bits: products are those of float32, and half the "
        "bytes are read; default: chosen by checkpoint and machine.",
        choices=tuple(DTYPE_BYTES),
    )
    quantization: str | None = option(
        None,
        "Numbers of the linear layers' weights: w8a8_int8, w4a8, w8a16 and fp8 quantise while "
        "loading, gguf takes the file's own blocks, gguf_a8 too, with activations in 8 bits "
        "(faster with many tokens, less exact), the others (and fp8) name what the checkpoint is "
        "in, none is the data type; default: as the checkpoint's config.json says, for a GGUF file "
        "on a CPU its own blocks, else none.",
        choices=QUANTIZATIONS,
    )
    context_length: int | None = option(
        None,
        "Prompt and output tokens of one request at most; default: the model's.",
        unit="tokens",
    )
    sampling_defaults: str = option(
        "model",
        "Where sampling parameters come from that a request leaves open: model, its "
        "generation_config.json, then the catalogue, and what these leave open from openai; "
        "openai, the defaults of OpenAI's API.",
        choices=SAMPLING_DEFAULTS,
    )
    is_embedding: bool = option(
        False,
        "Make embeddings with a model that could generate; encoders and models with a "
        "classification head never generate, with or without it.",
    )
    pooling_method: str | None = option(
        None,
        "Which hidden state becomes the embedding: that of the last token, the mean of all, or "
        "that of the first (cls); default: the model's own.",
        choices=POOLING_METHODS,
    )
    tool_call_parser: str = option(
        "auto",
        "How the model spells calls of tools; auto: as its chat template shows, and generic where "
        "that has no place for tools; none: calls stay in the text.",
    )
    reasoning_parser: str = option(
        "auto",
        "How the model marks its thinking; auto: as its chat template shows; none: thinking stays "
        "in the text.",
    )
    unknown_tool_calls: str = option(
        "content",
        "What becomes of a call of a tool that the request does not have: content, it comes back "
        "as text; call, it is a call like any other.",
        choices=UNKNOWN_TOOL_CALLS,
    )
    download_dir: str | None = option(
        None, "Directory in which models are cached; default: $SAPWOOD_HOME."
    )
    json_model_override_args: str = option(
        "{}",
        "JSON object whose values replace those of the model's config.json, which stays as it is; "
        "an object in it is merged with the one there.",
    )
    preferred_sampling_params: str | None = option(
        None,
        'JSON object of sampling parameters that a request leaves open, such as {"temperature": '
        "0.7}; they go before those of --sampling-defaults.",
    )
    delete_ckpt_after_loading: bool = option(
        False,
        "Delete the model's weight files from the disk when the engine is ready. Only for a model "
        "that is given as a path; the server cannot load it again.",
    )
    offline: bool = option(False, "Use only what is cached; never ask a source.")
    model_checksum: str | None = option(
        None,
        "Verify the model's files before they are read, and start only if they are what is "
        "expected: a manifest of `sapwood verify generate`, a hub repository (owner/name), or "
        "origin, what the hub or the catalogue says about this model, which is also meant by the "
        "flag alone; default: no verification.",
        bare="origin",
    )
    trust_remote_code: bool = option(
        False,
        "Run Python that came with the checkpoint, with all rights of this process, for an "
        "architecture that neither sapwood nor transformers has.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not self.model:
            raise ConfigError("--model is empty; name a model, see `sapwood pull --list`")
        if self.context_length is not None and self.context_length < 2:
            raise ConfigError(
                f"--context-length is {self.context_length} but must be >= 2: a prompt token and "
                "an output token"
            )
        _ = self.config_changes, self.preferred_sampling

    @property
    def config_changes(self) -> dict[str, Any]:
        """What replaces values of config.json."""
        return _json_object("--json-model-override-args", self.json_model_override_args)

    @property
    def preferred_sampling(self) -> dict[str, float]:
        """Sampling parameters for requests that leave them open, by their names in the API."""
        text = self.preferred_sampling_params
        values = {} if text is None else _json_object("--preferred-sampling-params", text)
        for name, value in values.items():
            if name not in DEFAULTABLE:
                raise ConfigError(
                    f"--preferred-sampling-params has {name!r} but takes only: "
                    f"{', '.join(DEFAULTABLE)}"
                )
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value):
                raise ConfigError(
                    f"--preferred-sampling-params has {value!r} for {name}, which is no number"
                )
        return values


def _json_object(flag: str, text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{flag} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f'{flag} is {text!r} but must be a JSON object, such as {{"a": 1}}')
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolvedModel(ModelConfig):
    """After resolution: the model has a name and a length; `dtype` and `model_impl` are not
    "auto"."""

    served_model_name: str
    weight_dtype: str
    context_length: int
