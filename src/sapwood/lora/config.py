"""The configuration of an adapter, as PEFT writes it. Torch-free.

Source: the format of PEFT 0.21 (adapter_config.json); Hu et al. 2021, arXiv:2106.09685; rank-
stabilised scaling: Kalajdzievski 2023, arXiv:2312.03732; activated LoRA: Greenewald et al. 2025,
arXiv:2504.12397."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import msgspec

from sapwood.base.errors import ConfigError

CONFIG_FILE = "adapter_config.json"
MAX_CONFIG_BYTES = 4 * 2**20
MAX_PATTERNS = 10_000
MAX_INVOCATION_TOKENS = 1024

_PATH = re.compile(r"\^?(?:[\w-]|\\?\.)+\$?")


class AdapterConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The fields that change what an adapter adds. Which layers have an adapter is told by the
    tensors themselves; PEFT writes none for a layer that target_modules, exclude_modules or
    layers_to_transform leave out.

    r, lora_alpha  rank and alpha of layers that no pattern names
    rank_pattern, alpha_pattern  those of the layers whose paths end with the key
    alora_invocation_tokens  the adapter adds from the last place on where a prompt has these
        tokens, and nothing before; None or empty: it adds to all tokens
    """

    r: int
    lora_alpha: float
    peft_type: str = "LORA"
    target_modules: list[str] | str | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}
    use_rslora: bool = False
    fan_in_fan_out: bool = False
    alora_invocation_tokens: list[int] | None = None

    def scaling(self, path: str, rank: int) -> float:
        """The factor of what the adapter of rank `rank` adds to the layer with that path."""
        alpha = next(
            (value for key, value in self.alpha_pattern.items() if _names(key, path)),
            self.lora_alpha,
        )
        return alpha / math.sqrt(rank) if self.use_rslora else alpha / rank

    def rank(self, path: str) -> int:
        """The rank that the configuration gives the layer."""
        found = (value for key, value in self.rank_pattern.items() if _names(key, path))
        return next(found, self.r)

    @property
    def max_rank(self) -> int:
        return max(self.r, *self.rank_pattern.values(), 0)


def adapter_config(values: dict[str, Any], source: str) -> AdapterConfig:
    """The configuration from the object in adapter_config.json.

    source  names the adapter in errors
    Raises  ConfigError for a field that is missing, wrong, or asks for what is not done here
    """
    _refuse(values, source)
    known = {name: values[name] for name in AdapterConfig.__struct_fields__ if name in values}
    known = {name: value for name, value in known.items() if value is not None}
    try:
        config = msgspec.convert(known, AdapterConfig)
    except msgspec.ValidationError as error:
        raise ConfigError(f"{source}: {CONFIG_FILE} is no configuration of LoRA: {error}") from None
    for field in ("rank_pattern", "alpha_pattern"):
        patterns: dict[str, float] = getattr(config, field)
        if len(patterns) > MAX_PATTERNS:
            raise ConfigError(f"{source}: {field} has over {MAX_PATTERNS} entries")
        for key in patterns:
            if not _PATH.fullmatch(key):
                raise ConfigError(
                    f"{source}: {field} has the regular expression {key[:80]!r}; name the layers "
                    "by their paths, or by the ends of these"
                )
    ranks = [config.r, *config.rank_pattern.values()]
    alphas = [config.lora_alpha, *config.alpha_pattern.values()]
    if min(ranks) < 1 or not all(map(math.isfinite, alphas)):
        raise ConfigError(f"{source}: ranks must be at least 1, and alphas finite numbers")
    invocation = config.alora_invocation_tokens or []
    if len(invocation) > MAX_INVOCATION_TOKENS or not all(0 <= one < 2**31 for one in invocation):
        raise ConfigError(
            f"{source}: alora_invocation_tokens must be token ids, at most {MAX_INVOCATION_TOKENS}"
        )
    return config


def read_config(folder: Path) -> AdapterConfig:
    """The configuration of the adapter in a folder; ConfigError as `adapter_config`."""
    path = folder / CONFIG_FILE
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"{folder} is no LoRA adapter: {CONFIG_FILE} cannot be read ({error.strerror}); give "
            "the folder that PEFT's save_pretrained wrote"
        ) from None
    return parse_config(text, str(folder))


def parse_config(text: bytes, source: str) -> AdapterConfig:
    """The configuration from what adapter_config.json has; ConfigError as `adapter_config`."""
    if len(text) > MAX_CONFIG_BYTES:
        raise ConfigError(f"{source}: {CONFIG_FILE} has over {MAX_CONFIG_BYTES} bytes")
    try:
        values = msgspec.json.decode(text, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise ConfigError(f"{source}: {CONFIG_FILE} is no JSON object: {error}") from None
    return adapter_config(values, source)


def _refuse(values: dict[str, Any], source: str) -> None:
    """ConfigError, with the field's name, for what would be left out if nobody refused it."""
    kind = values.get("peft_type", "LORA")
    if kind != "LORA":
        raise ConfigError(f"{source}: peft_type is {kind!r}; only LORA is served")
    for field, what in (
        ("use_dora", "DoRA scales the rows of the weights themselves"),
        ("trainable_token_indices", "embeddings of single tokens"),
        ("lora_bias", "a bias of the low-rank layers"),
        ("layer_replication", "layers that occur several times"),
        ("use_qalora", "QALoRA"),
        ("use_bdlora", "block-diagonal adapters"),
        ("arrow_config", "routing among adapters"),
    ):
        if values.get(field):
            raise ConfigError(
                f"{source}: {field} is set ({what}), which is not served yet; merge the adapter "
                "into its base, or train it without"
            )
    bias = values.get("bias", "none")
    if bias != "none":
        raise ConfigError(f"{source}: bias is {bias!r}, but trained biases are not served yet")


def _names(key: str, path: str) -> bool:
    """Whether a key of rank_pattern or alpha_pattern names the layer: as a whole path, or its end.
    As PEFT: a dot stands before the end of a path; ^ demands the whole path."""
    plain = key.removeprefix("^").removesuffix("$").replace("\\.", ".")
    return path == plain or (not key.startswith("^") and path.endswith(f".{plain}"))
