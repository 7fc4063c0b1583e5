"""What `make wheel` makes of a built module: a name, a list of parts, an index; and the version.

`make wheel-check` builds the wheels, and uses them in a fresh environment and on emulated
processors.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from io import BytesIO
from pathlib import Path

import pytest

from sapwood.kernels.cpu import CpuKernels
from scripts.wheels import checked_wheel, index, parts_list
from scripts.wheels.build import mark_changes
from scripts.wheels.version_of_tag import FIRST, nightly_version, packed_version, version_of

ROOT = Path(__file__).parents[2]
INFO = "sapwood-1.2.dist-info"
BUILT = pytest.mark.skipif(
    not CpuKernels.usable_isas() or sys.platform != "linux" or shutil.which("g++") is None,
    reason="the extension is not built by GCC for Linux",
)


@pytest.mark.parametrize(
    ("description", "version"),
    [
        (None, FIRST),
        ("v0.2.0-0-g1a2b3c4", "0.2.0"),
        ("v0.2.0-3-g1a2b3c4", "0.2.1.dev3+g1a2b3c4"),
        ("v1.0rc1-0-g1a2b3c4", "1.0rc1"),
        ("v1.0rc1-2-g1a2b3c4", "1.0rc2.dev2+g1a2b3c4"),
    ],
)
def test_versions_come_from_tags(description: str | None, version: str) -> None:
    from packaging.version import Version

    assert version_of(description) == version
    assert str(Version(version)) == version


def test_versions_rise_from_tag_to_tag() -> None:
    from packaging.version import Version

    described = ["v0.2.0-0-ga", "v0.2.0-1-gb", "v0.2.0-12-gc", "v0.2.1rc1-0-gd", "v0.2.1rc1-1-ge",
                 "v0.2.1-0-gf"]  # fmt: skip
    versions = [Version(version_of(text)) for text in described]
    assert versions == sorted(versions)


def test_a_tag_that_is_no_version_is_an_error() -> None:
    with pytest.raises(ValueError, match="vnext-1-gab"):
        version_of("vnext-1-gab")


def test_the_version_of_a_tagged_checkout_and_of_an_sdist(tmp_path: Path) -> None:
    def git(*args: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True)

    assert nightly_version(tmp_path) == FIRST  # no checkout
    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "one")
    assert nightly_version(tmp_path).startswith(f"{FIRST}.dev1+g")
    git("tag", "v3.1")
    git("commit", "-q", "--allow-empty", "-m", "two")
    assert nightly_version(tmp_path).startswith("3.2.dev1+g")
    assert packed_version(tmp_path) is None
    (tmp_path / "PKG-INFO").write_text("Metadata-Version: 2.1\nVersion: 7.8\n")
    assert packed_version(tmp_path) == "7.8"


# ---- a wheel ----


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As scikit-build-core writes it, but with the module alone."""
    from sapwood.kernels.cpu import _native

    kind = f"linux_{platform.machine()}"
    module = Path(str(_native.__file__))
    files = {f"sapwood/kernels/cpu/{module.name}": module.read_bytes()}
    path = tmp_path_factory.mktemp("raw") / f"sapwood-1.2-cp311-cp311-{kind}.whl"
    return packed(path, kind, files)


def packed(path: Path, kind: str, modules: dict[str, bytes]) -> Path:
    meta = b"Metadata-Version: 2.1\nName: sapwood\nVersion: 1.2\nRequires-Python: >=3.11\n"
    tag = f"Wheel-Version: 1.0\nTag: cp311-cp311-{kind}\nRoot-Is-Purelib: false\n"
    files = {**modules, f"{INFO}/WHEEL": tag.encode(), f"{INFO}/METADATA": meta}
    files[f"{INFO}/RECORD"] = checked_wheel.record(files, f"{INFO}/RECORD")
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in files.items():
            wheel.writestr(name, content)
    return path


@pytest.fixture(scope="module")
def dist(raw: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished wheel and an sdist."""
    into = tmp_path_factory.mktemp("a dist")
    checked_wheel.finished(raw, into, machine(raw), parts=parts_list.of(ROOT, raw))
    info = b"Metadata-Version: 2.1\nName: sapwood\nVersion: 1.2\nRequires-Python: >=3.11\n"
    with tarfile.open(into / "sapwood-1.2.tar.gz", "w:gz") as archive:
        entry = tarfile.TarInfo("sapwood-1.2/PKG-INFO")
        entry.size = len(info)
        archive.addfile(entry, BytesIO(info))
    return into


def machine(wheel: Path) -> str:
    return wheel.name.removesuffix(".whl").partition("linux_")[2]


@BUILT
def test_the_kernels_need_no_newer_libraries_than_torch(raw: Path) -> None:
    assert checked_wheel.symbols_after(raw) == []
    assert checked_wheel.fitting_platform(raw, machine(raw)) == f"manylinux_2_28_{machine(raw)}"


@BUILT
def test_the_module_exports_what_python_asks_for_alone(raw: Path) -> None:
    [module] = checked_wheel.modules(raw).values()
    assert checked_wheel.exported(module) == ["PyInit__native"]


@BUILT
def test_a_symbol_of_a_newer_library_is_refused(tmp_path: Path, raw: Path) -> None:
    source = tmp_path / "newer.c"
    source.write_text(
        "#include <pthread.h>\nint f(pthread_mutex_t* m) {return pthread_mutex_trylock(m);}"
    )
    subprocess.run(["g++", "-shared", "-fPIC", source, "-o", tmp_path / "newer.so"], check=True)
    newer_module = {"sapwood/newer.so": (tmp_path / "newer.so").read_bytes()}
    kind = f"linux_{machine(raw)}"
    wheel = packed(tmp_path / raw.name, kind, checked_wheel.modules(raw) | newer_module)
    newer = "pthread_mutex_trylock@GLIBC_2.34"
    if not any(
        f"{symbol}@{version}" == newer for symbol, version in checked_wheel.needed_symbols(wheel)
    ):
        pytest.skip("this machine's C library is older")
    with pytest.raises(checked_wheel.WheelError, match="pthread_mutex_trylock"):
        checked_wheel.fitting_platform(wheel, machine(raw))


@BUILT
def test_pip_takes_the_wheel_from_its_index(dist: Path, tmp_path: Path) -> None:
    [folder] = index.write(dist, [wheel_kind(dist)])
    download = ["-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "--isolated",
                "--disable-pip-version-check", "--python-version", "3.11", "-d", tmp_path,
                "--index-url", folder.as_uri(), "sapwood"]  # fmt: skip
    subprocess.run([sys.executable, *download], check=True, capture_output=True)
    [got] = tmp_path.iterdir()
    assert got.read_bytes() == (dist / got.name).read_bytes()
    with zipfile.ZipFile(got) as wheel:
        rows = wheel.read(f"{INFO}/RECORD").decode().split()
        assert {row.split(",")[0] for row in rows} == set(wheel.namelist())
        assert (
            f"cp311-cp311-manylinux_2_28_{wheel_kind(dist)}" in wheel.read(f"{INFO}/WHEEL").decode()
        )


def wheel_kind(dist: Path) -> str:
    [wheel] = dist.glob("*.whl")
    return wheel.name.removesuffix(".whl").partition("manylinux_2_28_")[2]


@BUILT
def test_an_index_with_missing_or_other_files_is_an_error(dist: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(dist, tmp_path / "copy"))
    kind = wheel_kind(copy)
    with pytest.raises(index.ListError, match="no wheel for riscv64"):
        index.write(copy, [kind, "riscv64"])
    page = index.write(copy, [kind])[0] / "sapwood" / "index.html"
    assert len(index.check(page)) == 2
    [wheel] = copy.glob("*.whl")
    wheel.write_bytes(wheel.read_bytes() + b"\0")
    with pytest.raises(index.ListError, match="is not the file"):
        index.check(page)
    wheel.unlink()
    with pytest.raises(index.ListError, match="which is missing"):
        index.check(page)
    (copy / "sapwood-1.2.tar.gz").write_bytes(b"nothing")
    wheel.write_bytes(b"PK")
    with pytest.raises(index.ListError, match="cannot be read"):
        index.write(copy, [kind])


def test_the_list_of_parts_is_cyclonedx_and_has_all_requirements() -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    parts = parts_list.of(ROOT, Path("sapwood-1.2-cp311-cp311-linux_x86_64.whl"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(parts)) is None
    components = parts["components"]
    assert isinstance(components, list)
    names = {part["name"] for part in components}
    assert {"torch", "markdown-it", "dompurify", "nanobind", "huggingface-hub"} <= names
    [torch] = [part for part in components if part["name"] == "torch"]
    assert torch["purl"] == "pkg:pypi/torch@2.13.0"


def test_the_extra_all_has_every_extra() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = project["optional-dependencies"]
    [everything] = extras["all"]
    listed = everything.removeprefix("sapwood[").removesuffix("]").split(",")
    # Triton comes with torch where there is a GPU; `dev` is for a checkout.
    assert sorted(listed) == sorted(set(extras) - {"all", "dev", "gpu"})


def test_only_changed_sources_are_compiled_again(tmp_path: Path) -> None:
    """Every file of an sdist has the same time; make wheel once took objects of older sources."""
    known, fresh = tmp_path / "known", tmp_path / "fresh"
    for folder, changed in ((known, b"old"), (fresh, b"new")):
        (folder / "src").mkdir(parents=True)
        for name, content in (("same", b"same"), ("changed", changed)):
            (folder / "src" / name).write_bytes(content)
            os.utime(folder / "src" / name, (1e9, 1e9))
    os.utime(known / "src" / "same", (1.5e9, 1.5e9))
    (fresh / "added").write_bytes(b"x")
    os.utime(fresh / "added", (1e9, 1e9))
    began_s = time.time() - 1
    mark_changes(fresh, known)
    assert (fresh / "src" / "same").stat().st_mtime == 1.5e9
    assert (fresh / "src" / "changed").stat().st_mtime >= began_s
    assert (fresh / "added").stat().st_mtime >= began_s
