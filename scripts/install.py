"""Installs sapwood from this checkout into a virtual environment: scripts/install.py .venv [--dev]

Says what it does and how long that took. It needs nothing but Python, since it runs before anything
is installed. `make serve` and `make test` call it; what is installed already is left as it is.
"""

from __future__ import annotations

import argparse
import itertools
import os
import queue
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

try:
    import tomllib
except ModuleNotFoundError:
    sys.exit("sapwood needs Python 3.11 or newer; for instance: make PYTHON=python3.12 serve")

ROOT = Path(__file__).resolve().parent.parent
COMPILERS = ("c++", "g++", "clang++")
NATIVE, ALL = "native", "all"
"""Instruction sets of the kernels (CMakeLists.txt): to serve on this machine; to run all tests."""
STAMPS = (".installed", ".installed-dev")
"""In the environment: what make looks at to see that it need not install again."""
NOTE_EVERY_S = 15.0
"""How often progress is told where the output is no terminal."""
MOST_LINES = 60
"""Of a failed command's output that are shown."""
PIP = ("-m", "pip", "install", "--disable-pip-version-check")
LAZY = ("--no-compile",)
"""Bytecode of all modules would take pip longer than everything else; Python writes that of the
modules that it imports."""

_STEP = re.compile(r"\[(\d+)/(\d+)\]")
_RETRY = re.compile(r"\*\*\* CMake (build|configuration|install) failed")


class CommandError(Exception):
    """A command of a stage ended with another status than 0."""


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("environment", type=Path, help="where the virtual environment is or goes")
    parser.add_argument("--dev", action="store_true", help="also what the tests need")
    asked = parser.parse_args(args)
    try:
        return install(asked.environment.absolute(), is_dev=asked.dev, screen=Screen(sys.stderr))
    except CommandError as error:
        sys.stderr.write(f"{error}\n")
        return 1


def install(environment: Path, *, is_dev: bool, screen: Screen) -> int:
    """The exit status: 0 also without kernels where nobody asked for the tests' packages."""
    python = str(environment / "bin/python")
    if not Path(python).exists():
        screen.stage("virtual environment", [sys.executable, "-m", "venv", str(environment)])
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    torch, others = requirements(project, is_dev=is_dev)
    # Torch comes first and alone: with its exact version in place, nothing else can move it.
    screen.stage("torch", [python, *PIP, *LAZY, torch])
    screen.stage("packages", [python, *PIP, *LAZY, *others])
    sets = ALL if is_dev else NATIVE
    output = screen.stage("kernels", [python, *PIP, *editable(sets)], verb="compiling")
    for stamp in STAMPS:
        (environment / stamp).unlink(missing_ok=True)
    if is_built(environment):
        for stamp in STAMPS[: 2 if is_dev else 1]:
            (environment / stamp).touch()
        return 0
    screen.say(missing_kernels(output))
    return 1 if is_dev and compiler() is not None else 0


def requirements(project: dict[str, dict[str, object]], *, is_dev: bool) -> tuple[str, list[str]]:
    """(torch, everything else) that sapwood needs to be built and to run."""
    wanted = [*_strings(project["project"]["dependencies"])]
    wanted += _strings(project["build-system"]["requires"])
    wanted += ["cmake>=3.22", "ninja"]  # as scikit-build-core would, where the system has none
    extras = project["project"]["optional-dependencies"]
    assert isinstance(extras, dict)
    wanted += _strings(extras["dev" if is_dev else "media"])
    [torch] = [name for name in wanted if re.match(r"torch\b", name)]
    return torch, [name for name in wanted if name != torch]


def editable(sets: str) -> list[str]:
    """pip's arguments for sapwood itself. The build runs in the environment and in one folder, so
    that what is compiled already is not compiled again; -v shows the compiler's steps."""
    define = f"cmake.define.SAPWOOD_INSTRUCTION_SETS={sets}"
    return [
        "-v",
        *LAZY,
        "--no-deps",
        "--no-build-isolation",
        "--config-settings",
        define,
        "--editable",
        str(ROOT),
    ]


def is_built(environment: Path) -> bool:
    found = environment.glob("lib/python*/site-packages/sapwood/kernels/cpu/_native*")
    return any(found)


def compiler() -> str | None:
    """The C++ compiler that CMake would find, or None."""
    names = [os.environ["CXX"].split()[0]] if os.environ.get("CXX") else COMPILERS
    return next((path for path in map(shutil.which, names) if path is not None), None)


def missing_kernels(output: str) -> str:
    """Why there are no kernels, what that means and what helps."""
    then = "Sapwood is installed and computes with torch's kernels, several times slower."
    if compiler() is None:
        return (
            f"There is no C++ compiler, so the CPU kernels were not compiled. {then} Install one "
            "that knows C++20 (Debian, Ubuntu: apt-get install g++) and run make again."
        )
    lines = list(itertools.takewhile(lambda line: not _RETRY.search(line), output.splitlines()))
    shown = "\n".join(lines[-MOST_LINES:])
    return f"{shown}\nThe CPU kernels could not be compiled; the errors are above. {then}"


class Screen:
    """Where stages are told: on a terminal one line that changes, elsewhere a line now and then."""

    def __init__(self, out: TextIO, *, note_every_s: float = NOTE_EVERY_S) -> None:
        self._out = out
        self._is_terminal = out.isatty()
        self._note_every_s = note_every_s
        self._noted_s = 0.0

    def say(self, text: str) -> None:
        self._out.write(f"{self._clear}{text}\n")
        self._out.flush()

    def stage(self, name: str, command: Sequence[str], *, verb: str = "installing") -> str:
        """Run a command and return its output; CommandError, with that output, if it fails."""
        began_s = self._noted_s = time.monotonic()
        self._show(f"{verb} {name} ...", is_note=True)
        lines, steps = [], ""
        # Without make's own settings: ninja would take them for its, and compile on one core.
        env = {name: value for name, value in os.environ.items() if name != "MAKEFLAGS"}
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env
        ) as process:
            for line in _lines(process):
                if line is not None:
                    lines.append(line)
                    found = _STEP.search(line)
                    steps = f" {found[1]}/{found[2]}" if found else steps
                seconds = time.monotonic() - began_s
                self._show(f"{verb} {name}{steps}, {_clock(seconds)}")
        output = "".join(lines)
        if process.returncode != 0:
            shown = "\n".join(output.splitlines()[-MOST_LINES:])
            self.say(shown)
            raise CommandError(f"{name}: {' '.join(command)} ended with {process.returncode}")
        self.say(f"{name}: {_clock(time.monotonic() - began_s)}")
        return output

    def _show(self, text: str, *, is_note: bool = False) -> None:
        """On a terminal the line that changes; elsewhere a line, if it is time for a note."""
        now_s = time.monotonic()
        if self._is_terminal:
            self._out.write(f"{self._clear}{text}")
            self._out.flush()
        elif is_note or now_s - self._noted_s >= self._note_every_s:
            self._noted_s = now_s
            self.say(text)

    @property
    def _clear(self) -> str:
        return "\r\033[K" if self._is_terminal else ""


def _lines(process: subprocess.Popen[str]) -> Iterator[str | None]:
    """The lines of a process as they come; None once a second while there is none."""
    assert process.stdout is not None
    source, arrived = process.stdout, queue.Queue[str]()

    def read() -> None:
        for line in source:
            arrived.put(line)
        arrived.put("")

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            line = arrived.get(timeout=1.0)
        except queue.Empty:
            yield None
            continue
        if line == "":
            return
        yield line


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _strings(values: object) -> list[str]:
    assert isinstance(values, list)
    return [str(value) for value in values]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
