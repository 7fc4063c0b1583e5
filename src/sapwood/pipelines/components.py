"""The components of a diffusers folder: model_index.json, and a folder for each component."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from sapwood.base.errors import ModelSourceError
from sapwood.kernels.registry import Need, select_kernels
from sapwood.layers.build import Build
from sapwood.layers.quantization.dense import DENSE, MANY_ROWS
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.models.loader.assign import Loadable, load_weights
from sapwood.models.loader.safetensors import iterate
from sapwood.pipelines.loras import DIT_FOLDERS, AdaptableComponent, PictureAdapters
from sapwood.pipelines.single_files import fill_from_file
from sapwood.store.files import ModelFiles, read_index

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

M = TypeVar("M", bound=Loadable)

MODEL_INDEX = "model_index.json"
_STEMS = ("diffusion_pytorch_model", "model")
"""Of weight files: diffusers' components, transformers' components."""
_HEAD_DIM, _PAGE_SIZE = 64, 16
"""For the choice of kernels, if a component has no attention over pages: any size will do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Precisions:
    """The data type of each kind of component, and how the transformer's weights are stored.

    vae_tiling  whether the autoencoder computes large pictures tile by tile: less memory, and a
                stop between any two tiles, for pictures that differ a little from whole ones
    """

    dit: torch.dtype = torch.float32
    text_encoders: tuple[torch.dtype, ...] = (torch.float32,)
    vae: torch.dtype = torch.float32
    dit_scheme: LinearScheme = DENSE
    vae_tiling: bool = False

    def text_encoder(self, index: int) -> torch.dtype:
        """Of the first encoder, the second, …; the last type that is given is the others' too."""
        return self.text_encoders[min(index, len(self.text_encoders) - 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class ComponentFolder:
    """A folder with model_index.json.

    index     per component (its library, its class)
    adapters  is told of the components whose layers can have LoRA's additions; None: nobody asks
    dit_file  the weights of what draws, instead of those in its folder
    """

    path: Path
    index: Mapping[str, tuple[str, str]]
    fields: Mapping[str, Any] = field(default_factory=dict)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    kernels: str | None = None
    adapters: PictureAdapters | None = None
    dit_file: Path | None = None

    @staticmethod
    def open(
        path: Path,
        *,
        device: torch.device | None = None,
        kernels: str | None = None,
        adapters: PictureAdapters | None = None,
        dit_file: Path | None = None,
    ) -> ComponentFolder:
        """Raises ModelSourceError if there is no readable model_index.json."""
        table = read_json(path / MODEL_INDEX)
        index = {
            name: (str(value[0]), str(value[1]))
            for name, value in table.items()
            if isinstance(value, list) and len(value) == 2 and all(value)
        }
        others = {name: value for name, value in table.items() if not isinstance(value, list)}
        return ComponentFolder(
            path=path,
            index=index,
            fields=others,
            device=device or torch.device("cpu"),
            kernels=kernels,
            adapters=adapters,
            dit_file=dit_file,
        )

    @property
    def pipeline_class(self) -> str:
        return str(self.fields.get("_class_name", ""))

    def config(self, name: str) -> dict[str, Any]:
        """config.json of a component; scheduler_config.json of the scheduler."""
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        return read_json(self.path / name / file)

    def load(
        self,
        name: str,
        make: Callable[[Mapping[str, Any], Build], M],
        dtype: torch.dtype,
        scheme: LinearScheme = DENSE,
        *,
        head_dim: int = _HEAD_DIM,
    ) -> M:
        """A component with its weights. Raises WeightError if they do not fit.

        head_dim  of its attention over pages, if it has any, for the choice of kernels
        """
        config = self.config(name)
        if name in DIT_FOLDERS and scheme.name == "none":
            scheme = MANY_ROWS
        adapters = self.adapters if _takes_adapters(name, config) else None
        build = replace(
            self.build(dtype, head_dim=head_dim),
            scheme=scheme,
            adapters=None if adapters is None else adapters.context,
        )
        model = make(config, build)
        if self.dit_file is not None and name in ("transformer", "unet"):
            fill_from_file(model, self.dit_file, config, dtype)
        else:
            fill(model, self.path / name, dtype)
        if adapters is not None:
            rename: Callable[[str], str] = getattr(model, "checkpoint_name", str)
            adapters.components[name] = AdaptableComponent.of(
                model.targets(), config, rename, dtype=dtype, device=self.device
            )
        return model

    def build(self, dtype: torch.dtype, *, head_dim: int = _HEAD_DIM) -> Build:
        """What a component's layers are built with. head_dim: as of `load`"""
        need = Need(device=self.device.type, dtype=dtype, head_dim=head_dim, page_size=_PAGE_SIZE)
        kernels = select_kernels(need, self.kernels).kernels
        return Build(kernels=kernels, device=self.device, dtype=dtype)

    def tokenizer(self, name: str) -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        found: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(self.path / name)
        return found


def _takes_adapters(name: str, config: Mapping[str, Any]) -> bool:
    """Those that LoRA's trainers change: what draws, and CLIP."""
    architectures = config.get("architectures") or [""]
    return name in DIT_FOLDERS or str(architectures[0]).startswith("CLIPText")


def fill(model: Loadable, folder: Path, dtype: torch.dtype) -> None:
    """Place a component's tensors."""
    files = weight_files(folder)
    rename: Callable[[str], str] = getattr(model, "checkpoint_name", str)
    load_weights(model, renamed(iterate(files, dtype), rename), source=str(folder))


def renamed(
    weights: Iterable[tuple[str, Tensor]], rename: Callable[[str], str]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors by their names in `targets()`. Of a tensor that the checkpoint has under two
    names the second one is left out."""
    by_own: dict[str, str] = {}
    for name, tensor in weights:
        own = rename(name)
        if by_own.setdefault(own, name) == name or own == name == by_own[own]:
            yield own, tensor


def weight_files(folder: Path) -> ModelFiles:
    """The safetensors of a component, one file or several with an index.

    Raises ModelSourceError if there are none, or if the index names one that is missing."""
    for stem in _STEMS:
        index = folder / f"{stem}.safetensors.index.json"
        single = folder / f"{stem}.safetensors"
        if single.is_file():
            names = [single.name]
        elif index.is_file():
            names = list(dict.fromkeys(read_index(index).values()))
        else:
            names = sorted(path.name for path in folder.glob(f"{stem}.*.safetensors"))[:1]
        paths = tuple(folder / name for name in names)
        missing = [path.name for path in paths if not path.is_file()]
        if missing:
            raise ModelSourceError(
                f"{folder} lacks the weight files {', '.join(missing)}; download the model again"
            )
        if paths:
            return ModelFiles(
                name=folder.name, path=folder, weights=paths, weight_format="safetensors"
            )
    raise ModelSourceError(
        f"{folder} has no safetensors of a component ({_STEMS[0]}.safetensors or "
        f"{_STEMS[1]}.safetensors); save the pipeline with safe_serialization"
    )


def read_json(path: Path) -> dict[str, Any]:
    """Raises ModelSourceError if the file is no JSON object."""
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelSourceError(
            f"{path} cannot be read ({error}); a diffusion model is a folder with {MODEL_INDEX} "
            "and a folder for each component"
        ) from error
    if not isinstance(found, dict):
        raise ModelSourceError(f"{path} must hold a JSON object, not a {type(found).__name__}")
    return found
