"""Uses the wheels of a folder as a stranger would: make wheel-check

Emulated: the x86-64 wheel's module loads and computes on a Nehalem, a Haswell and a Zen 3, and the
ARM wheel's on three ARM processors, each with the table of its instructions.

Fresh: an environment on a path with spaces, without a compiler on PATH, gets the wheel from its
index by pip. Then sapwood serve, sapwood chat, sapwood gateway and LLM answer there, with the
machine's best table, the first of them within 30 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from scripts.wheels import checked_wheel, index

ROOT = Path(__file__).resolve().parents[2]
ALONE = Path(__file__).parent / "loads_alone.py"
X86 = {"Nehalem": "generic", "Haswell": "avx2", "EPYC-Milan": "avx2"}
ARM = {"cortex-a72": "neon", "neoverse-n1": "neon_dotprod", "max": "neon_bf16"}
"""Processors as qemu calls them -> the table that they must get. EPYC-Milan is Zen 3."""
ARM_PACKAGES = (
    *(
        "libpython3.11-minimal",
        "python3.11-minimal",
        "libpython3.11-stdlib",
        "libc6",
        "libffi8",  # which ctypes loads
    ),
    *("libgcc-s1", "libstdc++6", "zlib1g", "libexpat1"),
)
"""Debian 12's Python for ARM and what it needs."""
MODEL = "smollm2-135m"
FIRST_ANSWER_S = 30.0
TOOLS = ("sh", "bash", "env", "uname", "ldconfig", "cat", "ls")
"""All that is on PATH in the fresh environment."""


class CheckError(Exception):
    """The wheel does not do what it must."""


def main(args: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("dist", type=Path, help="the folder that make wheel has filled")
    parser.add_argument("--only", choices=("emulated", "fresh"), help="one half of the checks")
    parser.add_argument("--model", default=MODEL, help="what is served in the fresh environment")
    asked = parser.parse_args(args)
    dist = asked.dist.resolve()
    try:
        if asked.only != "fresh":
            emulated(dist)
        if asked.only != "emulated":
            with tempfile.TemporaryDirectory(prefix="sapwood wheel check ") as folder:
                fresh(dist, Path(folder), asked.model)
    except (CheckError, checked_wheel.WheelError, index.ListError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def newest(dist: Path, machine: str) -> Path:
    """The newest wheel for this Python; for another kind of machine, for Python 3.11."""
    here = f"cp{sys.version_info[0]}{sys.version_info[1]}"
    python = here if machine == platform.machine() else "cp311"
    wheels = sorted(dist.glob(f"sapwood-*-{python}-*_{machine}.whl"), key=os.path.getmtime)
    if not wheels:
        raise CheckError(f"{dist} has no wheel of {python} for {machine}: run make wheel")
    return wheels[-1]


# ---- emulated processors ----


def emulated(dist: Path) -> None:
    with tempfile.TemporaryDirectory(prefix="sapwood emulated ") as scratch:
        module = extracted(newest(dist, "x86_64"), Path(scratch) / "x86")
        for processor, table in X86.items():
            runs_alone(["qemu-x86_64", "-cpu", processor, sys.executable], module, table)
        module = extracted(newest(dist, "aarch64"), Path(scratch) / "arm")
        system = arm_system(ROOT / "build" / "arm-python")
        for processor, table in ARM.items():
            command = ["qemu-aarch64", "-cpu", processor, "-L", str(system)]
            runs_alone([*command, str(system / "usr/bin/python3.11")], module, table)


def runs_alone(python: Sequence[str], module: Path, table: str) -> None:
    """CheckError unless the module computes there, with this table."""
    if shutil.which(python[0]) is None:
        raise CheckError(f"{python[0]} is missing (Debian: qemu-user)")
    done = subprocess.run(
        [*python, "-S", str(ALONE), str(module)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise CheckError(f"{' '.join(python)}: {done.returncode}\n{done.stdout}\n{done.stderr}")
    told = json.loads(done.stdout)
    if told["chosen"] != table or told["usable"][-1] != table:
        raise CheckError(f"{python[2]} got {told} instead of {table}")
    say(f"{python[2]}: loaded and computed with {table}")


def extracted(wheel: Path, into: Path) -> Path:
    into.mkdir(parents=True)
    [(name, content)] = checked_wheel.modules(wheel).items()
    module = into / Path(name).name
    module.write_bytes(content)
    return module


def arm_system(folder: Path) -> Path:
    """A folder with Python for ARM, from Debian's packages; kept for the next time."""
    if (folder / "usr/bin/python3.11").exists():
        return folder
    if shutil.which("apt-get") is None or shutil.which("dpkg") is None:
        raise CheckError("Python for ARM is unpacked from Debian's packages: it needs apt and dpkg")
    with tempfile.TemporaryDirectory() as scratch:
        for name in ("state/lists/partial", "cache/archives/partial", "packages"):
            (Path(scratch) / name).mkdir(parents=True)
        (Path(scratch) / "status").touch()
        settings = {
            "APT::Architecture": "arm64",
            "APT::Architectures": "arm64",
            "APT::Sandbox::User": "root",
            "Dir::State": f"{scratch}/state",
            "Dir::Cache": f"{scratch}/cache",
            "Dir::State::status": f"{scratch}/status",
        }
        options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
        packages = Path(scratch) / "packages"
        told(["apt-get", *options, "update"], packages)
        told(["apt-get", *options, "download", *ARM_PACKAGES], packages)
        folder.mkdir(parents=True, exist_ok=True)
        for package in sorted(packages.glob("*.deb")):
            told(["dpkg", "-x", str(package), str(folder)], packages)
    return folder


# ---- a fresh environment ----


def fresh(dist: Path, folder: Path, model: str) -> None:
    wheel = newest(dist, platform.machine())
    environment = without_compiler(folder)
    python = folder / "an environment" / "bin" / "python"
    began = time.monotonic()
    told([sys.executable, "-m", "venv", str(python.parents[1])], folder)
    pages = dist / "index" / platform.machine() / "sapwood" / "index.html"
    index.check(pages)
    version = wheel.name.split("-")[1]
    install = [str(python), "-m", "pip", "install", "--no-compile", "--disable-pip-version-check"]
    told(
        [
            *install,
            "--find-links",
            pages.as_uri(),
            "--only-binary",
            "sapwood",
            f"sapwood=={version}",
        ],
        folder,
        environment,
    )
    torch = told([str(python), "-m", "pip", "list", "--format=freeze"], folder, environment)
    if not any(line.startswith("torch==2.13.0") for line in torch.splitlines()):
        raise CheckError("the wheel's pin of torch was not kept")
    ended = time.monotonic()
    say(f"pip installed {wheel.name} into {python.parents[1]} in {ended - began:.0f} s")
    sapwood = str(python.parent / "sapwood")
    engine, gateway = free_port(), free_port()
    with running([sapwood, "serve", model, "--port", str(engine)], folder, environment):
        answer = asked_for_answer(engine, until=ended + 4 * FIRST_ANSWER_S)
        first_s = time.monotonic() - ended
        say(f"first answer {first_s:.1f} s after pip ended: {answer!r}")
        if first_s > FIRST_ANSWER_S:
            raise CheckError(f"the first answer took {first_s:.0f} s, more than {FIRST_ANSWER_S}")
        shown = told([sapwood, "chat", "--url", f"http://127.0.0.1:{engine}"], folder, environment,
                     typed="Say hello.\n")  # fmt: skip
        say(f"sapwood chat: {shown.strip()[-60:]!r}")
        urls = ["--worker-urls", f"http://127.0.0.1:{engine}"]
        with running([sapwood, "gateway", "--port", str(gateway), *urls], folder, environment):
            say(f"sapwood gateway: {asked_for_answer(gateway, until=time.monotonic() + 60)!r}")
    offline(str(python), model, folder, environment)


def offline(python: str, model: str, folder: Path, environment: Mapping[str, str]) -> None:
    """LLM in the environment, and whether it computes with the best table of this machine."""
    code = (
        "from sapwood import LLM\n"
        "from sapwood.kernels.cpu import CpuKernels\n"
        "if __name__ == '__main__':\n"
        f"    with LLM({model!r}) as llm:\n"
        "        print(repr(llm.generate('The capital of France is')))\n"
        "        notes = llm.services.engine.info.notes\n"
        "        print([n for n in notes if n.startswith('kernels')][0])\n"
        "        print('best', CpuKernels.usable_isas()[-1])\n"
    )
    script = folder / "uses llm.py"
    script.write_text(code, encoding="utf-8")
    answer, note, best = told([python, str(script)], folder, environment).splitlines()[-3:]
    say(f"LLM: {answer[:100]}")
    if f"with {best.split()[1]} instructions" not in note:
        raise CheckError(f"the fresh environment computes slowly: {note}")
    say(note)


def without_compiler(folder: Path) -> dict[str, str]:
    """The environment, with a PATH on which nothing is found that compiles."""
    tools = folder / "few tools"
    tools.mkdir()
    for name in TOOLS:
        if (found := shutil.which(name)) is not None:
            (tools / name).symlink_to(found)
    kept = {
        k: v for k, v in os.environ.items() if k not in ("CC", "CXX", "PYTHONPATH", "VIRTUAL_ENV")
    }
    kept["PATH"] = str(tools)
    for compiler in ("c++", "g++", "clang++", "cc", "cmake", "ninja"):
        if shutil.which(compiler, path=kept["PATH"]) is not None:
            raise CheckError(f"{compiler} is on the PATH that should have no compiler")
    return kept


def asked_for_answer(port: int, *, until: float) -> str:
    """The answer of /v1/completions, tried again until there is one."""
    body = {"model": "", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
    while True:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/v1/models", timeout=5) as models:
                body["model"] = json.load(models)["data"][0]["id"]
            request = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/completions",
                json.dumps(body).encode(),
                {"content-type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as reply:
                return str(json.load(reply)["choices"][0]["text"])
        except (OSError, IndexError) as error:
            if time.monotonic() > until:
                raise CheckError(f"no answer on port {port}: {error}") from error
            time.sleep(0.2)


@contextlib.contextmanager
def running(
    command: Sequence[str], folder: Path, environment: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    log = folder / f"{Path(command[1]).name}.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out) as process,
    ):
        try:
            yield process
        except CheckError as error:
            raise CheckError(f"{log.read_text('utf-8', 'replace')[-4000:]}\n{error}") from error
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def told(
    command: Sequence[str],
    folder: Path,
    environment: Mapping[str, str] | None = None,
    *,
    typed: str = "",
) -> str:
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        input=typed,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        said = f"{done.stdout}\n{done.stderr}"[-6000:]
        raise CheckError(f"{said}\n{' '.join(command)} ended with {done.returncode}")
    return done.stdout


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
