"""Which model is served, and how it is read."""

from __future__ import annotations

from dataclasses import dataclass

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option

LOAD_FORMATS = ("auto", "safetensors", "gguf", "pt", "dummy")
DTYPES = ("auto", "float32", "bfloat16", "float16")
QUANTIZATIONS = ("w8a8_int8", "w4a8", "gguf")


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    model: str = option(
        "smollm2-135m",
        "Catalogue name, hub repository id (owner/name), or path of a model.",
        aliases=["model-path"],
    )
    revision: str | None = option(None, "Branch, tag or commit of the hub repository.")
    tokenizer_path: str | None = option(
        None, "Directory with the tokenizer, if it is not the model's own."
    )
    served_model_name: str | None = option(
        None, "Name that the API shows and accepts; default: the model's."
    )
    chat_template: str | None = option(
        None, "Chat template: a file, a built-in name, or jinja text; default: the model's own."
    )
    load_format: str = option(
        "auto",
        "Format of the weights; dummy: random weights of the configured shape.",
        choices=LOAD_FORMATS,
    )
    dtype: str = option("auto", "Data type of weights, activations and KV cache.", choices=DTYPES)
    quantization: str | None = option(
        None,
        "Numbers of the linear layers' weights: w8a8_int8 and w4a8 quantise while loading, gguf "
        "takes the file's own blocks; default: the data type.",
        choices=QUANTIZATIONS,
    )
    context_length: int | None = option(
        None,
        "Prompt and output tokens of one request at most; default: the model's.",
        unit="tokens",
    )
    offline: bool = option(False, "Use only what is cached; never ask a source.")

    def __post_init__(self) -> None:
        check_options(self)
        if not self.model:
            raise ConfigError("--model is empty; name a model, see `sapwood pull --list`")
        if self.context_length is not None and self.context_length < 2:
            raise ConfigError(
                f"--context-length is {self.context_length} but must be >= 2: a prompt token and "
                "an output token"
            )
