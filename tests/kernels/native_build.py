"""The folder that the module was compiled in: its objects by instruction set."""

from __future__ import annotations

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "src/sapwood/kernels/cpu/csrc"
CHOOSER = "instruction_sets.cpp"
"""The file that knows which sets were compiled."""


@dataclass(frozen=True)
class NativeBuild:
    folder: Path

    def of_set(self, name: str) -> list[Path]:
        return sorted((self.folder / f"CMakeFiles/kernels_{name}.dir").rglob("*.o"))

    def sets(self) -> list[str]:
        folders = (self.folder / "CMakeFiles").glob("kernels_*.dir")
        names = [folder.stem.removeprefix("kernels_") for folder in folders]
        return sorted(name for name in names if self.of_set(name))

    def without_set(self) -> list[Path]:
        """Compiled once, for every processor."""
        return sorted((self.folder / "CMakeFiles/_native.dir").rglob("*.o"))

    def linked(self, sets: list[str], folder: Path) -> Path:
        """The module with these sets alone, as CMakeLists.txt would make it; only the file that
        chooses among them has to be compiled again."""
        defines = ["-DSAPWOOD_X86", *(f"-DSAPWOOD_HAS_{name.upper()}" for name in sets)]
        chooser, module = folder / "chooser.o", folder / "_native.so"
        flags = ["-std=gnu++20", "-O1", "-fPIC", "-fvisibility=hidden"]
        _run("c++", *flags, *defines, "-c", str(CSRC / CHOOSER), "-o", str(chooser))
        others = [path for path in self.without_set() if path.name != f"{CHOOSER}.o"]
        kernels = [path for name in sets for path in self.of_set(name)]
        nanobind = self.folder / "libnanobind-static.a"
        objects = [str(path) for path in (chooser, *others, *kernels, nanobind)]
        _run("c++", "-shared", "-pthread", "-o", str(module), *objects)
        return module


def native_build() -> NativeBuild:
    """The newest build; the test skips if this is no checkout that was built, which CI's is."""
    modules = sorted(ROOT.glob("build/*/_native*.so"), key=lambda path: path.stat().st_mtime)
    if modules:
        return NativeBuild(modules[-1].parent)
    if "CI" in os.environ:
        pytest.fail("CI compiles the module in this checkout, but there is no build/*/_native*.so")
    pytest.skip("the module was not compiled in this checkout")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)
