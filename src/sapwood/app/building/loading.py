"""Loads weights into a model, and logs how long each step took."""

from __future__ import annotations

import ctypes
import logging
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypeVar

import psutil
import torch

from sapwood.app.building.model_defaults import read_json, reading
from sapwood.base.errors import ConfigError
from sapwood.kernels.accelerators import ACCELERATORS, best_accelerator
from sapwood.kernels.coded import LinearPart
from sapwood.kernels.kv_cache import DTYPES
from sapwood.layers.quantization import SCHEMES
from sapwood.layers.quantization.dense import DenseScheme
from sapwood.layers.quantization.formats import format_of
from sapwood.layers.quantization.formats.interface import CheckpointFormat
from sapwood.layers.quantization.gguf import CheckpointScheme
from sapwood.layers.quantization.interface import LinearScheme
from sapwood.layers.targets import Target
from sapwood.models.loader import quantized
from sapwood.models.loader.assign import Loadable, load_weights
from sapwood.models.loader.dummy import random_weights
from sapwood.models.loader.needed import Needed
from sapwood.models.loader.reading import Advance, Wanted, every, ignore
from sapwood.models.loader.weights import iterate_blocks, iterate_weights
from sapwood.schema.config.engine import ResolvedConfig
from sapwood.schema.config.model import GGUF_BLOCKS
from sapwood.store import ModelFiles
from sapwood.store.progress import Progress, Silent, stage

log = logging.getLogger(__name__)

W = TypeVar("W")


class Packable(Loadable, Protocol):
    def finalize(self) -> None: ...


class LoadWatch:
    """Follows the loading of models, and knows afterwards how long it took.

    beat          called before each part, so that a watchdog can tell slow from stuck
    progress      shows how much of the weights has been read
    load_s        seconds that loading weights took
    weight_bytes  memory that the weights took
    read_bytes    bytes of the checkpoint that were read
    """

    def __init__(
        self, beat: Callable[[str], None] | None = None, progress: Progress | None = None
    ) -> None:
        self._beat = beat
        self.progress = progress or Silent()
        self.load_s = 0.0
        self.weight_bytes = 0
        self.read_bytes = 0

    def advance(self, num_bytes: int) -> None:
        """So many bytes of the checkpoint have been read since the last call."""
        self.read_bytes += num_bytes
        self.progress.advance(num_bytes)

    def beat(self, doing: str) -> None:
        if self._beat is not None:
            self._beat(doing)

    def following(self, weights: Iterable[tuple[str, W]]) -> Iterator[tuple[str, W]]:
        """The same weights; the log then says how long the loader waited for them to be read."""
        waited_s, start_s = 0.0, time.perf_counter()
        for name, weight in weights:
            waited_s += time.perf_counter() - start_s
            self.beat(f"loading {name}")
            yield name, weight
            start_s = time.perf_counter()
        log.info("loading: waiting for tensors to be read took %.2f s of it", waited_s)

    @contextmanager
    def filling(self) -> Iterator[None]:
        start_s, before = time.perf_counter(), _memory_bytes()
        peak_before = _peak_bytes()
        yield
        give_back_freed_memory()
        self.load_s += time.perf_counter() - start_s
        weight_bytes = max(0, _memory_bytes() - before)
        self.weight_bytes += weight_bytes
        peak = _peak_bytes()
        # If the peak did not rise, it was reached earlier, and ours is unknown.
        if peak > peak_before and weight_bytes:
            log.info(
                "loading: the weights take %.0f MB of memory; %.0f MB at most while they were "
                "loaded, %.2f x",
                weight_bytes / 1e6,
                (peak - before) / 1e6,
                (peak - before) / weight_bytes,
            )


def give_back_freed_memory() -> None:
    """Let the C library hand back what was freed while loading: parts of layers that waited to be
    packed leave holes, which it would keep."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _memory_bytes() -> int:
    """Bytes of memory that this process has, on the machine and on its GPU."""
    on_gpu = 0 if (best := best_accelerator()) is None else ACCELERATORS.get(best).allocated_bytes()
    resident: int = psutil.Process().memory_info().rss
    return resident + on_gpu


def _peak_bytes() -> int:
    """The peak of this process's resident memory so far; 0 if the system does not say."""
    try:
        status = Path("/proc/self/status").read_text("ascii", "replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def fill(
    model: Packable,
    files: ModelFiles,
    config: ResolvedConfig,
    dtype: torch.dtype,
    *,
    name_of: Callable[[str], str] = str,
    wanted: Wanted = every,
    watch: LoadWatch | None = None,
) -> None:
    """Load and pack the weights of a model.

    name_of  from a tensor's name in the checkpoint to its name in the model
    wanted   by the latter: whether the tensor is one of this rank's
    """
    watch = watch or LoadWatch()
    with watch.filling():
        _fill(model, files, config, dtype, name_of, wanted, watch)


def _fill(
    model: Packable,
    files: ModelFiles,
    config: ResolvedConfig,
    dtype: torch.dtype,
    name_of: Callable[[str], str],
    wanted: Wanted,
    watch: LoadWatch,
) -> None:
    targets = model.targets()
    weights = stored_weights(
        targets, files, config, dtype, name_of=name_of, wanted=wanted, advance=watch.advance
    )
    if config.model.load_format == "dummy":
        with timed("random weights"):
            load_weights(model, watch.following(weights))
    else:
        form = checkpoint_format(files)
        kind = files.weight_format if form is None else f"{files.weight_format}, {form.name}"
        total = sum(path.stat().st_size for path in files.weights if path.is_file())
        with (
            timed(f"weights ({kind})"),
            stage(watch.progress, f"loading {files.name}", total),
        ):
            load_weights(model, watch.following(weights), source=str(_place_of(files)))
    watch.beat("packing weights")
    with timed("packing what was not packed meanwhile"):
        model.finalize()


def stored_weights(
    targets: Mapping[str, Target],
    files: ModelFiles,
    config: ResolvedConfig,
    dtype: torch.dtype,
    *,
    name_of: Callable[[str], str] = str,
    wanted: Wanted = every,
    advance: Advance = ignore,
) -> Iterator[tuple[str, torch.Tensor | LinearPart]]:
    """The weights that this rank needs, by their names in the model, one after another.

    name_of, wanted  as in `fill`
    advance          called with the bytes that were read
    """

    def is_wanted(name: str) -> bool:
        return wanted(name_of(name))

    weights: Iterable[tuple[str, torch.Tensor | LinearPart]]
    load_format = config.model.load_format
    if load_format == "dummy":
        yield from random_weights(targets, seed=config.scheduler.random_seed, dtype=dtype)
        return
    form = checkpoint_format(files)
    needed = Needed(targets, name_of, is_wanted)
    parts = Parts(targets, name_of) if config.parallel.tp_size > 1 else None
    if form is not None:
        weights = quantized.iterate(files, form, targets, advance, name_of, is_wanted)
    elif config.model.quantization in GGUF_BLOCKS:
        weights = iterate_blocks(
            files,
            load_format=load_format,
            dtype=dtype,
            advance=advance,
            wanted=needed,
            targets=parts,
        )
    else:
        weights = iterate_weights(
            files,
            load_format=load_format,
            dtype=dtype,
            advance=advance,
            wanted=needed,
            targets=parts,
            experts=needed.experts,
        )
    for name, tensor in weights:
        yield name_of(name), tensor


class Parts(Mapping[str, Target]):
    """A model's targets by the names in the checkpoint."""

    def __init__(self, targets: Mapping[str, Target], name_of: Callable[[str], str]) -> None:
        self._targets = targets
        self._name_of = name_of

    def __getitem__(self, name: str) -> Target:
        return self._targets[self._name_of(name)]

    def __iter__(self) -> Iterator[str]:
        return iter(self._targets)

    def __len__(self) -> int:
        return len(self._targets)


def _place_of(files: ModelFiles) -> Path:
    return files.weights[0] if len(files.weights) == 1 else files.weights[0].parent


def refuse_absurd_size(files: ModelFiles, num_parameters: int) -> None:
    """Raises ConfigError, before anything is built, if the files are too small for the model."""
    num_bytes = sum(path.stat().st_size for path in files.weights)
    if num_parameters > 8 * num_bytes:
        raise ConfigError(
            f"{files.path / 'config.json'} describes a model of {num_parameters} parameters, but "
            f"the weights in {_place_of(files)} have {num_bytes} bytes, less than a bit for each; "
            "download the model again"
        )


def checkpoint_format(files: ModelFiles) -> CheckpointFormat | None:
    """The format of a checkpoint that another tool quantised; None: it is not quantised.

    Raises ConfigError if the format cannot be read.
    """
    path = files.path / "config.json"
    with reading(path):
        return format_of(read_json(path))


def linear_scheme(config: ResolvedConfig, files: ModelFiles) -> LinearScheme:
    """The scheme of the linear layers: the checkpoint's own, or the one that the options name."""
    form = checkpoint_format(files)
    if form is not None:
        return CheckpointScheme(form.name)
    if config.model.quantization is None:
        return DenseScheme(dense_weight_dtype(config))
    return SCHEMES.get(config.model.quantization)()


def dense_weight_dtype(config: ResolvedConfig) -> torch.dtype | None:
    """What weights that are not quantised are kept in; None: the dtype of the activations, as
    always beside quantised weights."""
    if config.model.quantization is not None:
        return None
    return DTYPES[config.model.weight_dtype]


@contextmanager
def timed(what: str) -> Iterator[None]:
    start = time.perf_counter()
    yield
    log.info("loading: %s took %.2f s", what, time.perf_counter() - start)
