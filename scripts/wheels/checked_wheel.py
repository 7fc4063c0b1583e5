"""Makes a wheel that this machine built into one that pip takes on other machines, if it may be.

auditwheel finds what the kernels ask of a machine's C and C++ libraries. That must not be more than
torch's own wheels ask, since sapwood runs nowhere else anyway.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

OLDEST = (2, 28)
"""The C library that torch's wheels need (manylinux_2_28); also Debian 10, Ubuntu 20.04, RHEL 8."""
_TIME = (1980, 1, 1, 0, 0, 0)
"""Of every file in the wheel, so that the same sources make the same bytes."""
_PLATFORM = re.compile(r"manylinux_(\d+)_(\d+)_(\w+)")


class WheelError(Exception):
    """The wheel would not run, or not everywhere where its name says."""


def finished(raw: Path, into: Path, machine: str, *, parts: Mapping[str, object]) -> Path:
    """The wheel under the name of the oldest platform that it runs on, with its list of parts.

    raw     a wheel named linux_MACHINE, as scikit-build-core makes it
    parts   CycloneDX, which goes where PEP 770 has it
    Raises  WheelError if it needs a newer platform than torch's wheels
    """
    name, version, python, abi, platform = raw.name.removesuffix(".whl").split("-")
    if platform != f"linux_{machine}":
        raise WheelError(f"{raw.name} was to be for linux_{machine}")
    target = fitting_platform(raw, machine)
    wheel = into / f"{name}-{version}-{python}-{abi}-{target}.whl"
    info = f"{name}-{version}.dist-info"
    with zipfile.ZipFile(raw) as source:
        files = {entry.filename: source.read(entry) for entry in source.infolist()}
        modes = {entry.filename: entry.external_attr for entry in source.infolist()}
    tag = f"{python}-{abi}-"
    files[f"{info}/WHEEL"] = files[f"{info}/WHEEL"].replace(
        f"{tag}{platform}".encode(), f"{tag}{target}".encode()
    )
    files[f"{info}/sboms/sapwood.cdx.json"] = json.dumps(parts, indent=1).encode()
    files[f"{info}/RECORD"] = record(files, f"{info}/RECORD")
    into.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as packed:
        for path, content in sorted(files.items()):
            entry = zipfile.ZipInfo(path, _TIME)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = modes.get(path, 0o100644 << 16)
            packed.writestr(entry, content)
    return wheel


def record(files: Mapping[str, bytes], own: str) -> bytes:
    """RECORD: the hash and the size of every file but itself."""
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    for path, content in sorted(files.items()):
        if path != own:
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=")
            rows.writerow([path, f"sha256={digest.decode()}", len(content)])
    rows.writerow([own, "", ""])
    return text.getvalue().encode()


def fitting_platform(wheel: Path, machine: str) -> str:
    """The oldest manylinux platform on which auditwheel says that the wheel runs as it is."""
    found = oldest_platform(wheel, machine)
    tag = _PLATFORM.fullmatch(found)
    if tag is None or (int(tag[1]), int(tag[2])) > OLDEST:
        raise WheelError(
            f"{wheel.name} runs on {found} only, but torch's wheels on manylinux_2_28: "
            f"{'; '.join(symbols_after(wheel)) or 'it needs libraries of this machine'}"
        )
    return f"manylinux_{OLDEST[0]}_{OLDEST[1]}_{machine}"


def oldest_platform(wheel: Path, machine: str) -> str:
    from auditwheel.architecture import Architecture
    from auditwheel.libc import Libc
    from auditwheel.wheel_abi import analyze_wheel_abi

    info = analyze_wheel_abi(
        Libc.GLIBC,
        Architecture(machine),
        wheel,
        frozenset(),
        disable_isa_ext_check=False,
        allow_graft=False,
    )
    return str(info.overall_policy.name)


def symbols_after(wheel: Path) -> list[str]:
    """The symbols of the kernels that glibc and libstdc++ have only since OLDEST's successors."""
    newest = {"GLIBC_": OLDEST, "GLIBCXX_": (3, 4, 24), "CXXABI_": (1, 3, 11)}
    return [
        f"{symbol}@{version}"
        for symbol, version in needed_symbols(wheel)
        for prefix, limit in newest.items()
        if version.startswith(prefix)
        and tuple(map(int, version.removeprefix(prefix).split("."))) > limit
    ]


def needed_symbols(wheel: Path) -> list[tuple[str, str]]:
    """(symbol, version) of all that the kernels take from shared libraries."""
    from elftools.elf.elffile import ELFFile

    found = []
    for content in modules(wheel).values():
        elf = ELFFile(io.BytesIO(content))
        versions = elf.get_section_by_name(".gnu.version")
        names = {
            auxiliary.entry.vna_other: auxiliary.name
            for _, all_of in elf.get_section_by_name(".gnu.version_r").iter_versions()
            for auxiliary in all_of
        }
        for number, symbol in enumerate(elf.get_section_by_name(".dynsym").iter_symbols()):
            index = versions.get_symbol(number).entry.ndx
            if symbol.entry.st_shndx == "SHN_UNDEF" and index in names:
                found.append((symbol.name, names[index]))
    return found


def modules(wheel: Path) -> dict[str, bytes]:
    """The native modules of the wheel; WheelError if there is none."""
    with zipfile.ZipFile(wheel) as archive:
        found = {name: archive.read(name) for name in archive.namelist() if name.endswith(".so")}
    if not found:
        raise WheelError(f"{wheel.name} has no kernels")
    return found


def exported(module: bytes) -> list[str]:
    """What the module defines for others: Python wants its PyInit alone."""
    from elftools.elf.elffile import ELFFile

    symbols = ELFFile(io.BytesIO(module)).get_section_by_name(".dynsym").iter_symbols()
    return [
        symbol.name
        for symbol in symbols
        if symbol.entry.st_shndx != "SHN_UNDEF" and symbol.entry.st_info.bind != "STB_LOCAL"
    ]


def report(wheel: Path) -> str:
    """A line of what auditwheel and the module's symbols say."""
    names = [name for module in modules(wheel).values() for name in exported(module)]
    wrong = [name for name in names if not name.startswith("PyInit_")]
    if wrong:
        raise WheelError(f"{wheel.name} exports {', '.join(wrong[:5])}, which may meet another's")
    [platform] = {_PLATFORM.search(wheel.name)}
    assert platform is not None
    size = sum(len(module) for module in modules(wheel).values())
    return f"{platform[0]}, kernels {size / 2**20:.1f} MiB unpacked, exports {', '.join(names)}"
