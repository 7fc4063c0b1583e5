"""The weights of a serving engine: replaced, read, compared, and released with other memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from sapwood.app.building.loading import (
    Packable,
    checkpoint_format,
    give_back_freed_memory,
    stored_weights,
)
from sapwood.app.building.model_defaults import read_json, reading
from sapwood.app.building.released import ReleasableMemory
from sapwood.app.building.resolving import Resolved, fetch_files, read_shape
from sapwood.base.errors import ConfigError, InvalidRequest, WeightError
from sapwood.distributed.update_group import UpdateGroup
from sapwood.executor.captured_memory import CapturePlan
from sapwood.kernels.kv_cache import DTYPES
from sapwood.kernels.transfer import runs_ahead
from sapwood.lora.pickled import read_bucket, read_weights
from sapwood.models.lm.decoder import Decoder
from sapwood.models.loader import safetensors as stored_safetensors
from sapwood.models.loader.assign import PutBeside, check_weights, load_weights, put_beside
from sapwood.models.loader.dummy import random_weights
from sapwood.schema.config.model import GGUF_BLOCKS
from sapwood.schema.env import environment, home
from sapwood.schema.weights import (
    UPDATES,
    CheckWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    ReadWeight,
    ReleaseMemory,
    ResumeMemory,
    SetLimits,
    UpdateFromDisk,
    UpdateFromGroup,
    UpdateFromTensors,
    WeightOrder,
)
from sapwood.store import ModelFiles

UPDATE = "the update"
MAX_READ = 4096
"""Rows of a weight that are read at once."""
MAX_GROUPS = 8
_NOT_CHECKED = ("hf", "extra")


class Renewing(Protocol):
    """What runs the model's steps."""

    @property
    def kv_caches(self) -> Sequence[tuple[Tensor, ...]]: ...

    def renew(self) -> None: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class _Ready:
    """An update that lies beside the weights that compute.

    files, load_format  where its weights are; None: nowhere but here
    """

    put: PutBeside
    told: str
    files: ModelFiles | None
    load_format: str


class ServedWeights:
    """Carries out orders about the weights of one rank, between its steps.

    An update has two parts: what takes long is done beside the weights that compute, perhaps while
    they do, and then all change at once."""

    def __init__(
        self,
        resolved: Resolved,
        model: Decoder,
        fillable: Packable,
        runner: Renewing,
        captures: CapturePlan | None,
        rank: int = 0,
    ) -> None:
        """model     which is served
        fillable  the same, with the heads that its checkpoint has
        captures  the steps that the device captures; None: it captures none
        rank      of those that share the model
        """
        self._rank = rank
        self._resolved = resolved
        self._model = model
        self._fillable = fillable
        self._runner = runner
        self._captures = captures
        self._files: ModelFiles | None = resolved.files
        self._load_format = resolved.config.model.load_format
        self._before: tuple[ModelFiles | None, str] = (self._files, self._load_format)
        """Where the weights before the last update are; None: nowhere."""
        self._checked: tuple[ModelFiles, str] | None = None
        self._ready: _Ready | None = None
        self._has_changed = False
        """Whether the last update came as far as to change weights."""
        model.renewal.in_place = captures is not None
        self._groups: dict[str, UpdateGroup] = {}
        self._snapshot: dict[str, str] | None = None
        self._joins = ThreadPoolExecutor(1, "sapwood-join")
        self._beside = ThreadPoolExecutor(1, "sapwood-weights")
        self._memory = ReleasableMemory(resolved.config.memory, model, runner.kv_caches)

    # ---- orders ------------------------------------------------------------------------------

    @property
    def why_not_ready(self) -> str | None:
        return self._memory.why_not_ready

    def perform(self, order: WeightOrder) -> str:
        if self._ready is None:
            self.check(order)
        return self.carry_out(order)

    def prepare(self, order: WeightOrder) -> Future[None] | None:
        """Begin an update beside the steps; None: there is nothing to do before `perform`."""
        return self._beside.submit(self._prepare, order) if isinstance(order, UPDATES) else None

    def _prepare(self, order: UpdateFromDisk | UpdateFromTensors | UpdateFromGroup) -> None:
        self.check(order)
        self._ready = self._put_beside(order)

    def drop(self) -> None:
        """Forget what was prepared."""
        self._ready = None
        self._model.renewal.forget()

    def check(self, order: WeightOrder) -> None:
        """SapwoodError if an update cannot be; nothing has changed then."""
        match order:
            case UpdateFromDisk():
                self._checked = self._fitting_files(order)
            case UpdateFromTensors():
                self._check_given(list(self._tensors_of(order, with_numbers=False)))
            case UpdateFromGroup():
                self._group(order)
                self._check_given(_announced(order))

    def carry_out(self, order: WeightOrder) -> str:
        """What `check` has found right. An update that fails must be undone."""
        match order:
            case UpdateFromDisk() | UpdateFromTensors() | UpdateFromGroup():
                self._has_changed = False
                ready, self._ready = self._ready or self._put_beside(order), None
                return self._change(ready)
            case LeaveUpdateGroup():
                if self._groups.pop(order.group_name, None) is None:
                    raise InvalidRequest(f"there is no group {order.group_name!r} to destroy")
                return f"left the group {order.group_name}"
            case ReadWeight():
                return self._read(order)
            case CheckWeights():
                return self._compare(order.action)
            case ReleaseMemory():
                return self._release(order.tags)
            case ResumeMemory():
                return self._resume(order.tags)
            case JoinUpdateGroup() | SetLimits():
                raise RuntimeError("groups and limits are not for the model's weights")

    def join(self, order: JoinUpdateGroup) -> Future[str]:
        return self._joins.submit(self._join, order)

    def _join(self, order: JoinUpdateGroup) -> str:
        if order.group_name in self._groups:
            raise InvalidRequest(f"the group {order.group_name!r} exists; destroy it first")
        if len(self._groups) >= MAX_GROUPS:
            raise InvalidRequest(f"there are {MAX_GROUPS} groups already; destroy one first")
        rank = order.rank + self._rank
        self._groups[order.group_name] = UpdateGroup(
            order.group_name,
            host=order.master_address,
            port=order.master_port,
            rank=rank,
            world_size=order.world_size,
            backend=order.backend,
        )
        return f"joined the group {order.group_name} as rank {rank} of {order.world_size}"

    # ---- updates -----------------------------------------------------------------------------

    def undo(self) -> None:
        """Read the weights from before the last update again; RuntimeError, which ends the engine,
        if they are nowhere."""
        if not self._has_changed:
            return
        self._files, self._load_format = self._before
        if self._files is None:
            raise RuntimeError(
                "an update failed while weights were placed, and the weights before it are in no "
                "checkpoint"
            )
        self._load(self._files, self._load_format)

    def _fitting_files(self, order: UpdateFromDisk) -> tuple[ModelFiles, str]:
        self._refuse_unless_fillable()
        asked = self._resolved.asked
        load_format = order.load_format or "auto"
        model = replace(asked.model, model=order.path, load_format=load_format, revision=None)
        # The checksum is that of the files of the start.
        asked = replace(asked, model=replace(model, model_checksum=None))
        files = fetch_files(asked, home=home(environment()))
        self._refuse_other_model(files)
        self._check_stored(files, load_format)
        return files, load_format

    def _load(self, files: ModelFiles, load_format: str) -> int:
        report = load_weights(
            self._fillable, self._stored(files, load_format), source=str(files.path)
        )
        self._finish()
        return report.num_tensors

    def _stored(self, files: ModelFiles, load_format: str) -> Iterator[tuple[str, Any]]:
        resolved = self._resolved
        config = resolved.config
        config = replace(config, model=replace(config.model, load_format=load_format))
        return stored_weights(
            self._fillable.targets(),
            files,
            config,
            resolved.dtype,
            name_of=self._model.checkpoint_name,
            wanted=lambda name: not self._model.is_elsewhere(name),
        )

    def _check_stored(self, files: ModelFiles, load_format: str) -> None:
        """WeightError, before anything is placed, if the checkpoint does not fit."""
        if load_format == "dummy":
            return
        source, weights = str(files.path), None
        is_plain = checkpoint_format(files) is None and not self._has_blocks
        if is_plain and files.weight_format == "safetensors":
            name_of, dtype = self._model.checkpoint_name, self._resolved.dtype
            weights = (
                (name_of(name), torch.empty(shape, dtype=dtype, device="meta"))
                for name, shape in stored_safetensors.shapes(files).items()
                if not self._model.is_elsewhere(name_of(name))
            )
        check_weights(self._fillable, weights or self._stored(files, load_format), source=source)

    def _refuse_other_model(self, files: ModelFiles) -> None:
        """ConfigError if the checkpoint is of another architecture, of other sizes or quantised
        otherwise."""
        path = files.path / "config.json"
        config = read_json(path)
        with reading(path):
            shape = read_shape(config, None, files, self._resolved.config.model)
        context_length = self._resolved.config.model.context_length
        shape, own = shape.for_context(context_length), self._resolved.shape
        names = [field.name for field in fields(own) if field.name not in _NOT_CHECKED]
        differing = (
            ["architecture"]
            if type(shape) is not type(own)
            else [name for name in names if getattr(shape, name) != getattr(own, name)]
        )
        forms = [checkpoint_format(one) for one in (files, self._resolved.files)]
        if [form and form.name for form in forms[:1]] != [form and form.name for form in forms[1:]]:
            differing.append("quantization")
        if differing:
            raise WeightError(
                f"{path} differs from the served model's in {', '.join(differing)}; only weights "
                "can change while serving, so start a server with that model"
            )

    def _put_beside(self, order: UpdateFromDisk | UpdateFromTensors | UpdateFromGroup) -> _Ready:
        """What takes long of an update that `check` has found right. SapwoodError, and the weights
        are as before, if it fails all the same."""
        files, load_format, is_part = None, self._load_format, True
        weights: Iterable[tuple[str, Any]]
        match order:
            case UpdateFromDisk():
                assert self._checked is not None, "an order is checked before it is carried out"
                (files, load_format), self._checked = self._checked, None
                weights, is_part = self._stored(files, load_format), False
                told = f"loaded from {files.path}"
            case UpdateFromTensors():
                weights, told = self._named(self._tensors_of(order)), "taken from tensors"
            case UpdateFromGroup():
                weights = self._named(self._from_group(order))
                told = f"taken from the group {order.group_name}"
        source = UPDATE if files is None else str(files.path)
        try:
            with self._model.renewal.beside():
                put = put_beside(self._fillable, weights, source=source, may_be_partial=is_part)
        except OSError as error:
            raise WeightError(f"{error}; the weights stay as they were") from error
        told = f"{put.num_tensors} tensors were {told}"
        return _Ready(put=put, told=told, files=files, load_format=load_format)

    def _change(self, ready: _Ready) -> str:
        """Have the model compute with what lies ready."""
        self._before = (self._files, self._load_format)
        self._has_changed = True
        ready.put.place_late()
        old = self._model.renewal.change()
        self._fillable.finalize()
        self._runner.renew()
        self._memory.filled()
        self._files, self._load_format = ready.files, ready.load_format
        self._beside.submit(_give_back, old)
        return ready.told

    def _from_group(self, order: UpdateFromGroup) -> list[tuple[str, Tensor]]:
        group = self._group(order)
        tensors = [
            (name, torch.empty(told.shape, dtype=told.dtype, device=group.device))
            for name, told in _announced(order)
        ]
        if order.is_flattened:
            num_bytes = sum(tensor.nbytes for _, tensor in tensors)
            flat = torch.empty(num_bytes, dtype=torch.uint8, device=group.device)
            group.receive(flat)
            first = 0
            for _, tensor in tensors:
                piece = flat[first : first + tensor.nbytes]
                tensor.view(-1).view(torch.uint8).copy_(piece)
                first += tensor.nbytes
        else:
            for _, tensor in tensors:
                group.receive(tensor)
        return tensors

    def _group(self, order: UpdateFromGroup) -> UpdateGroup:
        group = self._groups.get(order.group_name)
        if group is None:
            raise InvalidRequest(
                f"there is no group {order.group_name!r}; call /init_weights_update_group first"
            )
        return group

    def _check_given(self, tensors: Sequence[tuple[str, Tensor]]) -> None:
        self._refuse_unless_fillable()
        if not tensors:
            raise InvalidRequest("the update has no tensors")
        if checkpoint_format(self._resolved.files) is not None or self._has_blocks:
            raise InvalidRequest(
                "the served weights are quantised in the checkpoint's own form, into which tensors "
                "cannot be turned here; update from disk with a checkpoint of that form, or start "
                "with --quantization none if the file is GGUF"
            )
        try:
            check_weights(self._fillable, self._named(tensors), source=UPDATE, may_be_partial=True)
        except WeightError as error:
            raise InvalidRequest(error.message) from error

    def _tensors_of(
        self, order: UpdateFromTensors, *, with_numbers: bool = True
    ) -> Iterable[tuple[str, Tensor]]:
        """Those of this rank's part; one part may be for all ranks."""
        num_ranks = self._resolved.config.parallel.num_ranks
        if len(order.parts) not in (1, num_ranks):
            raise InvalidRequest(
                f"serialized_named_tensors has {len(order.parts)} entries, but the model has "
                f"{num_ranks} ranks; send one entry for all, or one for each"
            )
        data = order.parts[self._rank if len(order.parts) > 1 else 0]
        try:
            match order.form:
                case "safetensors":
                    what = "serialized_named_tensors"
                    return stored_safetensors.sent(data, what, with_numbers=with_numbers)
                case "pickle":
                    return read_weights(data, UPDATE)
                case _:
                    return read_bucket(data, UPDATE)
        except ConfigError as error:
            raise InvalidRequest(error.message) from error

    def _named(self, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """By the model's names, and in the dtype in which a checkpoint's would come; those of this
        rank's layers."""
        dtype, name_of = self._resolved.dtype, self._model.checkpoint_name
        for name, tensor in tensors:
            if self._model.is_elsewhere(name_of(name)):
                continue
            is_wide = tensor.is_floating_point() and tensor.dtype.itemsize >= 2
            yield name_of(name), tensor.to(dtype) if is_wide else tensor

    def _finish(self) -> None:
        self._fillable.finalize()
        self._runner.renew()
        self._memory.filled()
        give_back_freed_memory()

    @property
    def _has_blocks(self) -> bool:
        return self._resolved.config.model.quantization in GGUF_BLOCKS

    def _refuse_unless_fillable(self) -> None:
        if self._memory.has_released_weights:
            raise InvalidRequest("the weights' memory is released; resume it first")
        shape = self._resolved.decoder
        in_place = self._resolved.config.model.quantization is None and not shape.experts
        if self._captures is not None and (not in_place or shape.latent is not None):
            raise InvalidRequest(
                "this model's captured steps refer to weights that are not refilled in place; "
                "start the server with --disable-graphs to update them"
            )

    # ---- reading and comparing -----------------------------------------------------------------

    def _read(self, order: ReadWeight) -> str:
        target = self._fillable.targets().get(self._model.checkpoint_name(order.name))
        if target is None:
            raise InvalidRequest(f"there is no weight {order.name!r}; names are the checkpoint's")
        value = None if target.read is None else target.read()
        if value is None:
            raise InvalidRequest(
                f"{order.name} is kept in a form from which it cannot be read back exactly"
            )
        if not 1 <= order.most <= MAX_READ:
            raise InvalidRequest(f"truncate_size is {order.most} but must be in 1 .. {MAX_READ}")
        if (part := target.part) is None:
            return json.dumps(value[: order.most].float().tolist())
        most = order.most - part.first if part.dim == 0 else order.most
        rows = value[: max(0, most)].float().tolist()
        return json.dumps({"dim": part.dim, "first": part.first, "rows": rows})

    def _compare(self, action: str) -> str:
        match action:
            case "snapshot":
                self._snapshot = self._digests()
                return f"{len(self._snapshot)} tensors are noted"
            case "reset_tensors":
                self._refuse_unless_fillable()
                dtype, targets = self._resolved.dtype, self._fillable.targets()
                load_weights(self._fillable, random_weights(targets, seed=0, dtype=dtype))
                self._finish()
                self._files = None
                return f"{len(targets)} tensors have random numbers now"
            case "compare":
                if self._snapshot is None:
                    raise InvalidRequest("there is no snapshot; ask for one first")
                return self._compared(self._snapshot, self._digests())
        raise InvalidRequest(
            f"action is {action[:100]!r} but must be snapshot, reset_tensors or compare"
        )

    def _compared(self, before: Mapping[str, str], now: Mapping[str, str]) -> str:
        differing = [name for name, digest in now.items() if before.get(name) != digest]
        if differing:
            raise InvalidRequest(
                f"{len(differing)} of {len(now)} tensors differ from the snapshot, first "
                f"{', '.join(differing[:5])}"
            )
        return f"{len(now)} tensors are those of the snapshot"

    def _digests(self) -> dict[str, str]:
        """Of all weights that can be read back, by name."""
        found: dict[str, str] = {}
        for name, target in self._fillable.targets().items():
            value = None if target.read is None else target.read()
            if value is not None:
                numbers = value.detach().contiguous().cpu().view(-1).view(torch.uint8)
                found[name] = hashlib.sha256(bytes(numbers.numpy())).hexdigest()
        if not found:
            raise InvalidRequest("no weight of this model can be read back exactly")
        return found

    # ---- memory ------------------------------------------------------------------------------

    def _release(self, tags: Sequence[str]) -> str:
        if runs_ahead(self._resolved.device):
            raise InvalidRequest("memory can be released where the engine computes on a CPU only")
        return self._memory.release(tags)

    def _resume(self, tags: Sequence[str]) -> str:
        told = self._memory.resume(tags)
        if self._memory.lacks_weights and self._files is not None:
            self._load(self._files, self._load_format)
            told += "; the weights were read from their checkpoint again"
        return told


def _give_back(old: list[object]) -> None:
    """Free old weights, which takes a while."""
    old.clear()
    give_back_freed_memory()


def _announced(order: UpdateFromGroup) -> list[tuple[str, Tensor]]:
    """Tensors without numbers, of the announced names, shapes and types."""
    if not len(order.names) == len(order.dtypes) == len(order.shapes):
        raise InvalidRequest("names, dtypes and shapes must be equally many")
    found: list[tuple[str, Tensor]] = []
    for name, kind, shape in zip(order.names, order.dtypes, order.shapes, strict=True):
        dtype = DTYPES.get(kind.removeprefix("torch."))
        if dtype is None:
            raise InvalidRequest(f"dtypes has {kind[:100]!r} but must be of {', '.join(DTYPES)}")
        if any(size < 0 for size in shape) or len(shape) > 8:
            raise InvalidRequest(f"the shape of {name[:200]} is {shape[:8]}")
        found.append((name, torch.empty(shape, dtype=dtype, device="meta")))
    return found
