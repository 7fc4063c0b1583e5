"""The report of `sapwood check`, as plain data for a table or for JSON."""

from __future__ import annotations

import dataclasses
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

from sapwood.app.building.resolving import Resolved
from sapwood.base.errors import StartupError
from sapwood.kernels.cpu import slower_because
from sapwood.kernels.kv_cache import DTYPES, KV_CACHE_DTYPES
from sapwood.kernels.platform import Platform, read_platform
from sapwood.kernels.registry import IMPLEMENTATIONS, Need, kernel_names, select_kernels
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.options import Given, option_specs

PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "fastapi", "msgspec", "triton")
COMPILERS = ("c++", "g++", "clang++")
COMPILER_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One line of a table: a name, its value, and the source or the reason of the value."""

    name: str
    value: object
    why: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """The whole report.

    problem  why the configuration could not be resolved, in which case `configuration` is empty
    """

    machine: Sequence[Row]
    software: Sequence[Row]
    kernels: Sequence[Row]
    model: Sequence[Row]
    configuration: Sequence[Row]
    problem: str | None

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def make_report(
    asked: EngineConfig,
    given: Mapping[str, Given],
    resolved: Resolved | None,
    problem: str | None,
) -> Report:
    """Make a report; `resolved` is None if there is a problem with the configuration."""
    facts, only = read_platform(), asked.execution.kernels
    return Report(
        machine=machine_rows(facts),
        software=software_rows(),
        kernels=[*kernel_rows(_need(asked, facts, resolved), only), *slower_rows(facts, only)],
        model=[] if resolved is None else model_rows(resolved),
        configuration=[] if resolved is None else configuration_rows(resolved, given),
        problem=problem,
    )


def machine_rows(facts: Platform) -> list[Row]:
    memory = psutil.virtual_memory()
    free = min(memory.available, facts.memory_bytes)
    return [
        Row(name="processor", value=facts.cpu_name or "unknown", why=facts.machine),
        Row(name="instructions", value=" ".join(sorted(facts.cpu_flags)) or "none of note"),
        Row(name="usable cores", value=facts.num_cores, why="by affinity and cgroup quota"),
        Row(name="memory", value=_gib(facts.memory_bytes), why=f"{_gib(free)} of it free"),
        Row(name="GPUs", value=", ".join(facts.device_names) or "none"),
        Row(name="default device", value=facts.device, why="the best device found"),
    ]


def software_rows() -> list[Row]:
    rows = [
        Row(name="sapwood", value=version("sapwood")),
        Row(name="python", value=platform.python_version(), why=platform.platform()),
    ]
    for package in PACKAGES:
        try:
            rows.append(Row(name=package, value=version(package)))
        except PackageNotFoundError:
            rows.append(Row(name=package, value="not installed"))
    return [*rows, compiler_row()]


def compiler_row() -> Row:
    """The C++ compiler with which an installation from source would build the CPU kernels."""
    for name in COMPILERS:
        path = shutil.which(name)
        if path is None:
            continue
        try:
            done = subprocess.run(
                [path, "--version"],
                capture_output=True,
                text=True,
                check=True,
                timeout=COMPILER_TIMEOUT_S,
            )
        except (OSError, subprocess.SubprocessError) as error:
            return Row(name="C++ compiler", value=path, why=f"does not run: {error}")
        return Row(name="C++ compiler", value=path, why=done.stdout.partition("\n")[0])
    return Row(name="C++ compiler", value="none", why=f"looked for {', '.join(COMPILERS)}")


def kernel_rows(
    need: Need, only: str | None, table: Mapping[str, str] = IMPLEMENTATIONS
) -> list[Row]:
    """Each implementation of the ops: in use, refused with a reason, or slower than that in use."""
    try:
        selection = select_kernels(need, only, table)
    except StartupError as error:
        return [Row(name="none", value="refused", why=error.message)]
    rows = []
    for name in kernel_names(table):
        if name == selection.kernels.name:
            isa = f", with {selection.kernels.isa} instructions" if selection.kernels.isa else ""
            rows.append(Row(name=name, value="used", why=f"for {need}{isa}"))
        elif name in selection.refusals:
            rows.append(Row(name=name, value="refused", why=selection.refusals[name]))
        elif only is not None:
            rows.append(Row(name=name, value="not tried", why=f"only {only} was asked for"))
        else:
            rows.append(Row(name=name, value="not needed", why="slower than the one used"))
    return rows


def slower_rows(facts: Platform, only: str | None) -> list[Row]:
    """Why the compiled kernels are slower than this processor allows, if they are."""
    why = slower_because(facts, only)
    return [] if why is None else [Row(name="cpu", value="could be faster", why=why)]


def model_rows(resolved: Resolved) -> list[Row]:
    files, decoder = resolved.files, resolved.shape
    shape = f"{decoder.num_layers} layers, hidden size {decoder.hidden_size}"
    heads = f"{decoder.num_heads} heads, {decoder.num_kv_heads} for keys and values"
    return [
        Row(name="name", value=files.name, why=str(files.path)),
        Row(name="weights", value=files.weight_format, why=", ".join(map(str, files.weights))),
        Row(name="architecture", value=decoder.architecture, why=f"{shape}, {heads}"),
    ]


def configuration_rows(resolved: Resolved, given: Mapping[str, Given]) -> list[Row]:
    """Every option with its value, and the decision, the source or the default behind it."""
    reasons = {decision.option: decision.reason for decision in resolved.decisions}
    rows = []
    for part in dataclasses.fields(EngineConfig):
        config = getattr(resolved.config, part.name)
        for spec in option_specs(type(config)):
            value = getattr(config, spec.name)
            why = reasons.get(spec.name)
            if spec.name == "kernels":
                value = resolved.kernels.kernels.name
            if why is None:
                why = f"from {given[spec.name].source}" if spec.name in given else "the default"
            rows.append(Row(name=spec.name, value=value, why=why))
    return rows


def _need(asked: EngineConfig, facts: Platform, resolved: Resolved | None) -> Need:
    """The need that the ops must serve; without a model, that of a model with common sizes."""
    config = asked if resolved is None else resolved.config
    return Need(
        device=torch.device(config.execution.device or facts.device).type,
        dtype=DTYPES.get(config.model.dtype, torch.float32),
        head_dim=64 if resolved is None else resolved.shape.head_dim,
        page_size=config.memory.page_size or 16,
        kv_dtype=KV_CACHE_DTYPES.get(config.memory.kv_cache_dtype),
    )


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f} GiB"
