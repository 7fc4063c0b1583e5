"""LoRA adapters: which are loaded, and how many run at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import msgspec

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option, option_specs
from sapwood.schema.limits import ADAPTER_NAME

EVICTION_POLICIES = ("lru", "fifo")
MODULES = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""What --lora-target-modules may name, besides any other linear layer of the model and `all`."""
FUSED = {"qkv_proj": MODULES[:3], "gate_up_proj": MODULES[4:6]}
"""Names of SGLang's for several of them."""
MAX_NAME_LENGTH = ADAPTER_NAME.most


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPath:
    """An adapter that the server starts with.

    name    by which requests name it
    path    the folder that PEFT's save_pretrained wrote, a catalogue name, or a hub repository
    pinned  whether it always stays loaded
    """

    name: str
    path: str
    pinned: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    enable_lora: bool = option(
        False, "Serve LoRA adapters of the model; --lora-paths implies this option."
    )
    lora_paths: str | None = option(
        None,
        "Adapters to start with, separated by blanks: PATH, NAME=PATH, or JSON with lora_name, "
        "lora_path and pinned. A path may be a hub repository (org/name), too. A name is a path's "
        "last part, unless it is given.",
        many=True,
    )
    max_lora_rank: int | None = option(
        None, "Largest rank of an adapter. Default: that of the adapters in --lora-paths."
    )
    lora_target_modules: str | None = option(
        None,
        "Layers that adapters may add to, separated by blanks: q_proj, k_proj, v_proj, o_proj, "
        "gate_proj, up_proj, down_proj, names of other linear layers, or all. Default: all.",
        many=True,
    )
    max_loras_per_batch: int = option(8, "Different adapters that may run at once.")
    max_loaded_loras: int | None = option(
        None,
        "Adapters kept in memory; beyond that the one unused longest is left out, and is read "
        "again when a request names it. Default: no limit.",
    )
    lora_eviction_policy: str = option(
        "lru",
        "Which adapter leaves the device first when another needs its place: the one unused "
        "longest (lru), or the one that has been there longest (fifo).",
        choices=EVICTION_POLICIES,
    )
    enable_lora_overlap_loading: bool = option(
        False,
        "Copy adapters to the device beside the steps, instead of between two of them; a request "
        "begins once its adapter is there. Needs --max-loaded-loras, which may be at most twice "
        "--max-loras-per-batch.",
    )

    def __post_init__(self) -> None:
        check_options(self)
        paths = self.paths
        if not self.is_on:
            self._refuse_idle_options()
            return
        if not paths and self.max_lora_rank is None:
            raise ConfigError(
                "--enable-lora without --lora-paths needs --max-lora-rank: the largest rank of "
                "the adapters that will be loaded later"
            )
        for name in ("max_lora_rank", "max_loras_per_batch", "max_loaded_loras"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be >= 1")
        if self.max_loaded_loras is not None:
            if self.max_loaded_loras < self.max_loras_per_batch:
                raise ConfigError(
                    f"--max-loaded-loras is {self.max_loaded_loras} but must be at least "
                    f"--max-loras-per-batch, which is {self.max_loras_per_batch}"
                )
            if len(paths) > self.max_loaded_loras:
                raise ConfigError(
                    f"--lora-paths has {len(paths)} adapters, but --max-loaded-loras is "
                    f"{self.max_loaded_loras}"
                )
        if self.enable_lora_overlap_loading and not (
            self.max_loaded_loras is not None
            and self.max_loaded_loras <= 2 * self.max_loras_per_batch
        ):
            raise ConfigError(
                "--enable-lora-overlap-loading needs --max-loaded-loras, at most twice "
                f"--max-loras-per-batch, which is {self.max_loras_per_batch}: adapters on their "
                "way to the device take memory, too"
            )
        if sum(path.pinned for path in paths) >= self.max_loras_per_batch:
            raise ConfigError(
                "fewer adapters than --max-loras-per-batch may be pinned, so that others can run"
            )

    @property
    def is_on(self) -> bool:
        return self.enable_lora or bool(self.lora_paths)

    @property
    def paths(self) -> tuple[LoraPath, ...]:
        """What --lora-paths names; ConfigError for anything else, or for a name given twice."""
        found = tuple(_path_of(item) for item in _items(self.lora_paths))
        names = [path.name for path in found]
        for name in names:
            if names.count(name) > 1:
                raise ConfigError(f"--lora-paths names {name!r} twice; give NAME=PATH")
        return found

    @property
    def modules(self) -> frozenset[str] | None:
        """Last parts of the paths of the layers that may have adapters; None: any."""
        names = _items(self.lora_target_modules)
        if not names or "all" in names:
            return None
        return frozenset(part for name in names for part in FUSED.get(str(name), (str(name),)))

    def _refuse_idle_options(self) -> None:
        for spec in option_specs(type(self)):
            if getattr(self, spec.name) != spec.default:
                raise ConfigError(
                    f"--{spec.name.replace('_', '-')} does nothing without --enable-lora or "
                    "--lora-paths; give one of them, or leave it out"
                )


def check_adapter_name(name: str) -> str:
    """The name; ConfigError if requests could not say it."""
    if not name or len(name) > MAX_NAME_LENGTH or any(c.isspace() or c == "\0" for c in name):
        raise ConfigError(
            f"{name[:40]!r} cannot be an adapter's name: it must have 1 to {MAX_NAME_LENGTH} "
            "characters and no blanks"
        )
    return name


def _items(text: str | None) -> list[Any]:
    """Separated by line ends, else by blanks; or what JSON lists."""
    if not text or not text.strip():
        return []
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    found: list[Any] = []
    for line in lines:
        if line[0] not in "[{":
            found += [line] if len(lines) > 1 else line.split()
            continue
        try:
            value = msgspec.json.decode(line)
        except msgspec.DecodeError as error:
            raise ConfigError(f"{line[:80]!r} is no JSON: {error}") from None
        found += value if isinstance(value, list) else [value]
    return found


def _path_of(item: Any) -> LoraPath:
    if isinstance(item, str):
        name, equals, path = item.partition("=")
        if not equals:
            name, path = item.rstrip("/").rpartition("/")[2], item
        return LoraPath(name=check_adapter_name(name), path=path)
    if not isinstance(item, dict) or not {"lora_name", "lora_path"} <= item.keys():
        raise ConfigError(f"--lora-paths has {item!r}, without lora_name and lora_path")
    unknown = sorted(item.keys() - {"lora_name", "lora_path", "pinned"})
    if unknown or not isinstance(item.get("pinned", False), bool):
        raise ConfigError(f"--lora-paths has {item!r}; pinned is true or false, and nothing else")
    return LoraPath(
        name=check_adapter_name(str(item["lora_name"])),
        path=str(item["lora_path"]),
        pinned=item.get("pinned", False),
    )
