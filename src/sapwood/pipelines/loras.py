"""The LoRA adapters of a loaded pipeline: which are known, and which add now, how strongly."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import msgspec
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest, NotFound
from sapwood.kernels.low_rank import LowRank
from sapwood.layers.adapters import AdapterSite, AdapterTarget
from sapwood.layers.steady_adapters import SteadyAdapters
from sapwood.layers.targets import Target
from sapwood.lora.picture_files import DIT, PicturePair, read_picture_adapter
from sapwood.pipelines.originals import Origin, origins
from sapwood.schema.painting import ActiveLora, LoadedLora, LoraList, LoraWish

DIT_FOLDERS = ("transformer", "transformer_2", "unet")
_SHOWN = 5

Parts = dict[AdapterSite, list[tuple[int, Tensor, Tensor]]]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class AdaptableComponent:
    """A component whose linear layers can have additions.

    layers  by every spelling of their paths; a spelling may stand for several layers at once
    """

    targets: Mapping[str, AdapterTarget]
    layers: Mapping[str, Origin]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(
        targets: Mapping[str, Target],
        config: Mapping[str, Any],
        name_of: Callable[[str], str],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> AdaptableComponent:
        """name_of: from a tensor's name in diffusers' files to the name in `targets`"""
        own = {
            name.removesuffix(".weight"): target.adapter
            for name, target in targets.items()
            if target.adapter is not None
        }
        layers = {name: Origin((name,)) for name in own}
        layers |= {
            name: origin
            for name, origin in origins(targets, config).items()
            if all(one in own for one in origin.names)
        }
        if name_of("text_model.final_layer_norm.weight") == "final_layer_norm.weight":
            layers |= {f"text_model.{name}": Origin((name,)) for name in own}
        flat = {name.replace(".", "_"): origin for name, origin in layers.items()}
        return AdaptableComponent(targets=own, layers=flat | layers, dtype=dtype, device=device)

    def place(self, pair: PicturePair, strength: float, parts: Parts, source: str) -> None:
        """Add what the pair adds to `parts`. ConfigError if it fits no layer."""
        origin = self.layers[pair.path]
        found = [self.targets[name] for name in origin.names]
        try:
            split = list(origin.parts(pair.b, [target.shape[0] for target in found]))
        except ValueError as error:
            raise ConfigError(
                f"{source} has B for {pair.path} with {error}; is it for another model?"
            ) from error
        a = pair.a.to(self.device, self.dtype)
        for target, (name, rows) in zip(found, split, strict=True):
            target.check(name, a, rows, source)
            scaled = (rows.float() * (pair.scale * strength)).to(self.device)
            parts[target.site].append(target.part(a, scaled))


@dataclass(slots=True)
class PictureAdapters:
    """All components of a pipeline that can have additions.

    Nothing is merged into weights: additions are computed beside them, so that switching them off
    gives the old numbers back, bit by bit, and quantised weights lose nothing."""

    context: SteadyAdapters = field(default_factory=SteadyAdapters)
    components: dict[str, AdaptableComponent] = field(default_factory=dict)
    _files: dict[str, tuple[str, list[PicturePair]]] = field(default_factory=dict)
    _active: list[ActiveLora] = field(default_factory=list)
    _placed: set[AdapterSite] = field(default_factory=set)

    def set(self, wishes: Sequence[LoraWish]) -> None:
        """From now on these add, and no others. Nothing changes if one of them is refused.

        Raises InvalidRequest or NotFound"""
        files = dict(self._files)
        for wish in wishes:
            self._check_target(wish.target)
            known = files.get(wish.nickname)
            if wish.path is not None and (known is None or known[0] != wish.path):
                try:
                    files[wish.nickname] = (wish.path, read_picture_adapter(wish.path))
                except ConfigError as error:
                    raise InvalidRequest(error.message, param="lora_path") from error
            elif known is None:
                raise NotFound(
                    f"there is no LoRA adapter {wish.nickname!r} yet; give its lora_path",
                    param="lora_nickname",
                )
        active = [
            ActiveLora(
                nickname=wish.nickname,
                path=files[wish.nickname][0],
                target=wish.target,
                strength=wish.strength,
                merged=True,
            )
            for wish in wishes
        ]
        self._apply(active, files)
        self._files, self._active = files, active

    def merge(self, target: str, strength: float | None) -> None:
        """Switch on again what was set; with a strength, all of it at that one."""
        self._switch(target, on=True, strength=strength)

    def unmerge(self, target: str) -> None:
        """Switch off what was set; it stays known."""
        self._switch(target, on=False, strength=None)

    def listing(self) -> LoraList:
        loaded = [LoadedLora(nickname=name, path=path) for name, (path, _) in self._files.items()]
        merged = [one for one in self._active if one.merged]
        by_folder = {
            name: tuple(one for one in merged if name in self._folders(one.target))
            for name in self._own_folders
        }
        active = {name: own for name, own in by_folder.items() if own}
        return LoraList(loaded_adapters=tuple(loaded), active=active)

    @property
    def _own_folders(self) -> list[str]:
        return [name for name in self.components if name in DIT_FOLDERS]

    def _folders(self, target: str) -> list[str]:
        """Those that a target means; "transformer" means a U-Net too."""
        own = self._own_folders
        return own if target == "all" else [target if target in own else own[0]]

    def _switch(self, target: str, *, on: bool, strength: float | None) -> None:
        self._check_target(target)
        if not self._active:
            raise InvalidRequest("no LoRA adapter is set; call /v1/set_lora first", param="target")
        changed = [
            msgspec.structs.replace(
                one, merged=on, strength=one.strength if strength is None else strength
            )
            for one in self._active
        ]
        self._apply(changed, self._files)
        self._active = changed

    def _check_target(self, target: str) -> None:
        own = self._own_folders
        if target not in ("all", "transformer", "unet", *own):
            raise InvalidRequest(
                f"target is {target[:80]!r}, but must be all, or one of {', '.join(own)}",
                param="target",
            )

    def _apply(
        self,
        active: Sequence[ActiveLora],
        files: Mapping[str, tuple[str, list[PicturePair]]],
    ) -> None:
        by_component: dict[str, Parts] = {name: defaultdict(list) for name in self.components}
        for one in active:
            if one.merged:
                self._add(one, files[one.nickname][1], by_component)
        additions = {
            site: LowRank.of(parts, self.components[name].dtype)
            for name, own in by_component.items()
            for site, parts in own.items()
        }
        for site in self._placed - additions.keys():
            site.place(0, None)
        for site, addition in additions.items():
            site.place(0, addition)
        self._placed = set(additions)

    def _add(
        self, one: ActiveLora, pairs: Sequence[PicturePair], by_component: Mapping[str, Parts]
    ) -> None:
        """Raises InvalidRequest for layers that the pipeline has not."""
        strange: list[str] = []
        for pair in pairs:
            if one.target != "all" and pair.component != DIT:
                continue
            names = self._folders(one.target) if pair.component == DIT else [pair.component]
            for name in names:
                component = self.components.get(name)
                if component is None or pair.path not in component.layers:
                    strange.append(f"{pair.component}: {pair.path}")
                    continue
                try:
                    component.place(pair, one.strength, by_component[name], one.path)
                except ConfigError as error:
                    raise InvalidRequest(error.message, param="lora_path") from error
        if strange:
            raise InvalidRequest(
                f"{one.path} adds to {len(strange)} layers that this pipeline has not, or that "
                f"additions are not served for: {', '.join(strange[:_SHOWN])}; is it for another "
                "model?",
                param="lora_path",
            )
