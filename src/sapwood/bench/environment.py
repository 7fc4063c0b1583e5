"""The machine and the code behind a figure, without which the figure means nothing."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

PACKAGES = ("sapwood", "torch", "transformers")


@dataclass(frozen=True, slots=True, kw_only=True)
class Environment:
    """The machine and the code behind a figure.

    commit    short git hash, with "+" if the checkout has changes; None outside a checkout
    versions  package -> version, for installed packages
    date      UTC, ISO 8601, to the second
    """

    commit: str | None
    cpu: str
    num_cores: int
    memory_gib: float
    system: str
    python: str
    versions: dict[str, str]
    date: str

    def __str__(self) -> str:
        packages = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        return (
            f"{self.cpu}, {self.num_cores} cores, {self.memory_gib:.0f} GiB; "
            f"commit {self.commit or 'unknown'}; {packages}; {self.date}"
        )


def describe_environment(packages: Sequence[str] = PACKAGES) -> Environment:
    """The environment of this process, found out without importing torch."""
    return Environment(
        commit=git_commit(Path(__file__).parent),
        cpu=cpu_model(),
        num_cores=usable_cores(),
        memory_gib=round(psutil.virtual_memory().total / 2**30, 1),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        versions=package_versions(packages),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def git_commit(directory: Path, run: Callable[..., str] | None = None) -> str | None:
    """The commit of the checkout in `directory`; None without git or outside a checkout.

    run  runs `git` with the given arguments and returns its output; replaced in tests
    """
    run = run or _git
    try:
        commit = run("-C", str(directory), "rev-parse", "--short=12", "HEAD").strip()
        changes = run("-C", str(directory), "status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit}+" if changes.strip() else commit


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            name, _, value = line.partition(":")
            if name.strip() == "model name":
                return value.strip()
    return platform.processor() or platform.machine()


def usable_cores() -> int:
    """Cores that this process may run on, which in a container are fewer than the machine's."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def package_versions(packages: Sequence[str]) -> dict[str, str]:
    """The versions of those packages that are installed."""
    found = {}
    for package in packages:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue  # A package may be missing: the gateway, for example, runs without torch.
    return found


def _git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", *arguments], capture_output=True, text=True, check=True, timeout=10
    )
    return done.stdout
