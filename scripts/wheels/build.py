"""Builds what `pip install sapwood` installs: make wheel [WHEEL_ARGS="--nightly --machine x86_64"]

dist/sapwood-VERSION.tar.gz                     the sdist
dist/sapwood-VERSION-cpXY-cpXY-PLATFORM.whl     a wheel per Python and kind of machine, with the
                                                kernels of every instruction set and a list of its
                                                parts (CycloneDX)
dist/index/KIND/                                what --index-url is pointed at, per kind of machine

Each wheel is built from the sdist, so that both have the same sources. A wheel that asks more of a
machine than torch's own wheels do (manylinux_2_28) is an error, and so is a file that the index
should have and dist has not.
"""

from __future__ import annotations

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from scripts.wheels import checked_wheel, index, parts_list, version_of_tag

ROOT = version_of_tag.ROOT
MACHINES = ("x86_64", "aarch64")
CROSS_COMPILER = {machine: f"{machine}-linux-gnu-g++" for machine in MACHINES}


class BuildError(Exception):
    """A tool is missing, or what was built does not fit."""


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--dist", type=Path, default=ROOT / "dist", help="folder of what is built")
    parser.add_argument(
        "--machine", choices=MACHINES, action="append", help="only wheels for this kind of machine"
    )
    parser.add_argument(
        "--python", action="append", help="interpreter with nanobind and scikit-build-core"
    )
    parser.add_argument("--nightly", action="store_true", help="a version for each commit")
    asked = parser.parse_args(args)
    machines = asked.machine or list(MACHINES)
    try:
        build(asked.dist.absolute(), machines, asked.python or [sys.executable], asked.nightly)
    except (BuildError, checked_wheel.WheelError, index.ListError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def build(dist: Path, machines: Sequence[str], pythons: Sequence[str], is_nightly: bool) -> None:
    version = (
        version_of_tag.nightly_version()
        if is_nightly
        else version_of_tag.dynamic_metadata("version", {})
    )
    dist.mkdir(parents=True, exist_ok=True)
    sdist = built_sdist(dist, version)
    say(f"{sdist.name}: {sdist.stat().st_size / 2**20:.1f} MiB")
    # Always at the same place: what is compiled already is not compiled again by the next build.
    source = unpacked(sdist, ROOT / "build" / "wheel-source")
    with tempfile.TemporaryDirectory(prefix="sapwood-wheel-") as scratch:
        for machine in machines:
            for python in pythons:
                raw = built_wheel(source, Path(scratch) / "raw", python, machine, version)
                wheel = checked_wheel.finished(raw, dist, machine, parts=parts_list.of(ROOT, raw))
                report = checked_wheel.report(wheel)
                say(f"{wheel.name}: {wheel.stat().st_size / 2**20:.1f} MiB, {report}")
    for path in index.write(dist, machines):
        say(f"index: {path}")


def built_sdist(dist: Path, version: str) -> Path:
    hook = "from scikit_build_core.build import build_sdist; import sys; build_sdist(sys.argv[1])"
    run([sys.executable, "-c", hook, str(dist)], ROOT, {version_of_tag.GIVEN: version})
    return dist / f"sapwood-{version}.tar.gz"


def unpacked(sdist: Path, folder: Path) -> Path:
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch, tarfile.open(sdist) as archive:
        archive.extractall(scratch, filter="data")
        fresh = Path(scratch) / sdist.name.removesuffix(".tar.gz")
        mark_changes(fresh, folder)
        shutil.rmtree(folder, ignore_errors=True)
        fresh.rename(folder)
    return folder


def mark_changes(fresh: Path, known: Path) -> None:
    """Give each file of `fresh` the time of the same file in `known`, or now if it is another one.

    All files of an sdist have one time, so that the build would take objects of older sources."""
    for path in fresh.rglob("*"):
        if not path.is_file():
            continue
        before = known / path.relative_to(fresh)
        if before.is_file() and before.read_bytes() == path.read_bytes():
            shutil.copystat(before, path)
        else:
            os.utime(path)


def built_wheel(source: Path, into: Path, python: str, machine: str, version: str) -> Path:
    """A wheel for this Python and any machine of that kind, before it is checked."""
    target = into / machine
    settings = ["-C", "cmake.define.SAPWOOD_INSTRUCTION_SETS=all", "-C", "cmake.build-type=Release"]
    folder = ROOT / "build" / f"wheel-{machine}-{Path(python).resolve().name}"
    settings += ["-C", f"build-dir={folder}"]
    environment = {version_of_tag.GIVEN: version}
    if machine != platform.machine():
        settings += cross_settings(machine)
        environment |= {"_PYTHON_HOST_PLATFORM": f"linux-{machine}"}
    command = [python, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation"]
    run([*command, *settings, "--wheel-dir", str(target), str(source)], source, environment)
    [wheel] = target.glob(f"sapwood-{version}-{python_tag(python)}-*.whl")
    if "-none-" in wheel.name:
        raise BuildError(f"{wheel.name} has no kernels: the compiler's errors are above")
    return wheel


def cross_settings(machine: str) -> list[str]:
    """CMake's, for a compiler that runs here and compiles for `machine`."""
    compiler = CROSS_COMPILER[machine]
    if shutil.which(compiler) is None:
        raise BuildError(
            f"a wheel for {machine} needs {compiler} (Debian: g++-{machine.replace('_', '-')}-linux"
            f"-gnu); or build on such a machine, with --machine {machine}"
        )
    defines = {
        "CMAKE_SYSTEM_NAME": "Linux",
        "CMAKE_SYSTEM_PROCESSOR": machine,
        "CMAKE_CXX_COMPILER": compiler,
    }
    defined = [
        word for name, value in defines.items() for word in ("-C", f"cmake.define.{name}={value}")
    ]
    return [*defined, "-C", f"cmake.args=-DCMAKE_STRIP={machine}-linux-gnu-strip"]


def python_tag(python: str) -> str:
    code = "import sys; print(f'cp{sys.version_info[0]}{sys.version_info[1]}')"
    return run([python, "-c", code], ROOT, {}).strip()


def run(command: Sequence[str], folder: Path, environment: Mapping[str, str]) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = "\n".join(done.stdout.splitlines()[-60:])
        raise BuildError(f"{tail}\n{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
