"""Manifests, and files compared with them; the hub is a server of our own."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from sapwood.base.errors import ConfigError, IntegrityError, ModelSourceError
from sapwood.store import ModelStore, Silent
from sapwood.store.catalogue import CatalogueEntry, WheelSpec
from sapwood.store.hub import HuggingFaceHub, Listing
from sapwood.store.manifest import Checksum, read_manifest, write_manifest
from sapwood.store.sources import Fetched
from sapwood.store.verify import generate, verify
from tests.gguf_sample import GgufSample

FILES = {
    "config.json": b"{}",
    "model-00001-of-00002.safetensors": b"a" * 5_000_000,
    "model-00002-of-00002.safetensors": b"b" * 300,
    "model.safetensors.index.json": json.dumps(
        {
            "weight_map": {
                "a": "model-00001-of-00002.safetensors",
                "b": "model-00002-of-00002.safetensors",
            }
        }
    ).encode(),
    "tokenizer.json": b"[]",
    "README.md": b"read me",
    "1_Pooling/config.json": b"{}",
}
SHARD = "model-00001-of-00002.safetensors"


class Bar(Silent):
    def __init__(self) -> None:
        self.total = self.done = 0
        self.lock = threading.Lock()

    def start(self, label: str, total: int | None) -> None:
        self.total = total or 0

    def advance(self, amount: int) -> None:
        with self.lock:
            self.done += amount


class Hub:
    """Says the checksums of `files`; those of ".safetensors" are in LFS."""

    def __init__(self, files: dict[str, bytes]) -> None:
        self.files = files
        self.asked: list[tuple[str, str | None]] = []

    def list_files(self, repository: str, revision: str | None) -> Listing:
        self.asked.append((repository, revision))
        sums = {
            name: Checksum(sha256=hashlib.sha256(data).hexdigest(), size=len(data))
            if name.endswith((".safetensors", ".gguf"))
            else Checksum(git_sha1=git_sha1(data), size=len(data))
            for name, data in self.files.items()
        }
        return Listing(commit="c0ffee", files={}, checksums=sums)

    def download(self, *_: object) -> Path:
        raise AssertionError


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


@pytest.fixture
def model(tmp_path) -> Path:
    directory = tmp_path / "model"
    for name, data in FILES.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (directory / ".cache").mkdir()
    (directory / ".cache" / "lock").write_bytes(b"")
    return directory


@pytest.fixture
def manifest(model, tmp_path) -> Path:
    path = tmp_path / "checksums.json"
    write_manifest(path, generate(Fetched(path=model), Silent()))
    return path


def run(path: Path, source: str | Path, *, hub: Hub | None = None, **options):
    options = {"load_format": "auto", "offline": False, "progress": Silent()} | options
    fetched = options.pop("fetched", Fetched(path=path))
    return verify(fetched, str(source), hub=hub or Hub(FILES), **options)


def test_a_manifest_has_sha256_and_size_of_every_file(manifest) -> None:
    expected = {
        name: {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
        for name, data in FILES.items()
    }
    assert json.loads(manifest.read_text()) == {"files": expected}


def test_files_that_are_as_listed_pass_and_the_bar_reaches_its_end(model, manifest) -> None:
    bar = Bar()
    checked = run(model, manifest, progress=bar, everything=True)
    assert checked.num_files == len(FILES)
    assert bar.done == bar.total == checked.num_bytes == sum(map(len, FILES.values()))


@pytest.mark.parametrize("everything", [True, False])
def test_each_file_that_differs_is_named_with_what_was_found(model, manifest, everything) -> None:
    changed = bytearray(FILES[SHARD])
    changed[4_000_000] ^= 1
    (model / SHARD).write_bytes(changed)
    (model / "config.json").write_bytes(b"{} ")
    (model / "tokenizer.json").unlink()
    with pytest.raises(IntegrityError) as caught:
        run(model, manifest, everything=everything)
    message = caught.value.message
    found, expected = (hashlib.sha256(data).hexdigest() for data in (changed, FILES[SHARD]))
    assert f"- {SHARD}: found SHA-256 {found}, expected {expected}" in message
    assert "- config.json: found 3 bytes, expected 2" in message
    assert "- tokenizer.json: is missing" in message
    assert message.startswith("3 of ")
    assert str(manifest) in message
    assert "Download the model again" in message


def test_serving_passes_over_files_that_it_does_not_read(model, manifest) -> None:
    (model / "README.md").write_bytes(b"changed")
    assert run(model, manifest).num_files == len(FILES) - 1
    with pytest.raises(IntegrityError, match=r"README\.md"):
        run(model, manifest, everything=True)


def test_a_file_that_serving_would_read_and_nobody_listed_is_refused(model, manifest) -> None:
    (model / "chat_template.jinja").write_text("evil")
    with pytest.raises(IntegrityError, match=r"chat_template\.jinja: is not listed"):
        run(model, manifest)


def test_the_old_form_is_read_with_a_warning(model, tmp_path, caplog) -> None:
    old = tmp_path / "old.json"
    sums = {name: hashlib.sha256(data).hexdigest() for name, data in FILES.items()}
    old.write_text(json.dumps({"checksums": sums}))
    with caplog.at_level(logging.WARNING):
        assert run(model, old).num_files == len(FILES) - 1
    assert "old form" in caplog.text
    (model / SHARD).write_bytes(b"x")
    with pytest.raises(IntegrityError, match=SHARD):
        run(model, old)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "cannot be read"),
        ("[]", 'neither "files" nor'),
        ("{}", 'neither "files" nor'),
        ('{"files": {}}', "lists no files"),
        ('{"files": {"a": "00"}}', "a has no sha256"),
        ('{"files": {"a": {"sha256": "00"}}}', "sha256 of a is '00'"),
        ('{"checksums": {"a": 5}}', "sha256 of a is 5"),
        (json.dumps({"files": {"a": {"sha256": "0" * 64, "size": -1}}}), "size of a is -1"),
        (json.dumps({"files": {"../a": {"sha256": "0" * 64}}}), r"'\.\./a' is no name"),
        (json.dumps({"files": {"/a": {"sha256": "0" * 64}}}), "'/a' is no name"),
    ],
)
def test_what_is_no_manifest_is_explained(tmp_path, content, message) -> None:
    path = tmp_path / "m.json"
    path.write_text(content)
    with pytest.raises(ModelSourceError, match=message):
        read_manifest(path)


def test_a_repository_is_a_source(model) -> None:
    hub = Hub(FILES)
    assert run(model, "org/tiny@v1", hub=hub).num_files == len(FILES) - 1
    assert hub.asked == [("org/tiny", "v1")]
    (model / "config.json").write_bytes(b"[]")
    with pytest.raises(IntegrityError, match=rf"config\.json: found git SHA-1 {git_sha1(b'[]')}"):
        run(model, "org/tiny", hub=hub)
    with pytest.raises(ConfigError, match="--offline forbids"):
        run(model, "org/tiny", offline=True)


def test_a_shard_that_the_hub_has_and_we_do_not_is_missing(model) -> None:
    (model / "model.safetensors.index.json").unlink()
    (model / SHARD).unlink()
    with pytest.raises(IntegrityError, match=f"{SHARD}: is missing"):
        run(model, "org/tiny")


def test_the_origin_of_what_came_from_the_hub_is_its_commit_there(model) -> None:
    hub = Hub(FILES)
    fetched = Fetched(path=model, repository="org/tiny", revision="c0ffee")
    run(model, "origin", hub=hub, fetched=fetched)
    assert hub.asked == [("org/tiny", "c0ffee")]


def test_names_in_a_directory_of_a_repository(tmp_path) -> None:
    directory = tmp_path / "c0ffee" / "sub"
    directory.mkdir(parents=True)
    path = GgufSample().write(directory / "m.gguf")
    fetched = Fetched(path=path, repository="org/tiny", revision="c0ffee")
    hub = Hub({"sub/m.gguf": path.read_bytes(), "m.gguf": b""})
    assert run(path, "origin", hub=hub, fetched=fetched).num_files == 1


def test_sources_that_are_none(model, tmp_path) -> None:
    with pytest.raises(ConfigError, match=r"nobody says checksums .*`sapwood verify generate`"):
        run(model, "origin")
    with pytest.raises(ModelSourceError, match=r"there is no manifest .*none\.json"):
        run(model, tmp_path / "none.json")
    with pytest.raises(ModelSourceError, match="org/tiny says no checksums"):
        run(model, "org/tiny", hub=Hub({}))


def test_a_store_verifies_before_it_reads_and_the_catalogue_is_an_origin(
    tmp_path, monkeypatch
) -> None:
    content = GgufSample().write(tmp_path / "source.gguf").read_bytes()
    wheel = WheelSpec(
        requirement="tiny==1",
        member="tiny/tiny.gguf",
        sha256=hashlib.sha256(content).hexdigest(),
        num_bytes=len(content),
        num_wheel_bytes=1,
    )
    entry = CatalogueEntry(name="tiny", description="", license="MIT", sources=(wheel,))
    home = tmp_path / "home"
    path = home / "models" / wheel.sha256[:32] / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    store = ModelStore(home=home, catalogue={"tiny": entry}, download=None, hub=Hub({}))  # type: ignore[arg-type]
    changed = bytearray(content)
    changed[100] ^= 1
    path.write_bytes(changed)
    with pytest.raises(IntegrityError, match=r"tiny\.gguf: found SHA-256"):
        store.fetch("tiny", checksum="origin", progress=Silent())
    assert not (home / "prepared").exists()
    path.write_bytes(content)
    assert store.fetch("tiny", checksum="origin", progress=Silent()).weights == (path,)
    assert store.verify("tiny", "origin", progress=Silent()).num_files == 1


# ---- huggingface_hub against a server of our own -------------------------------------------------


@pytest.fixture
def endpoint(monkeypatch) -> Iterator[list[str]]:
    """The paths that the hub's client asks for."""
    asked: list[str] = []
    siblings = [
        {
            "rfilename": SHARD,
            "size": 7,
            "blobId": "0" * 40,
            "lfs": {"sha256": "A" * 64, "size": 7, "pointerSize": 130},
        },
        {"rfilename": "config.json", "size": 2, "blobId": git_sha1(b"{}")},
    ]
    answer = {"id": "org/tiny", "sha": "c0ffee", "siblings": siblings}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            body = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.ENDPOINT", address, raising=False)
    yield asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_what_the_hub_says_of_files_in_lfs_and_of_others(endpoint) -> None:
    listing = HuggingFaceHub().list_files("org/tiny", "v1")
    assert "/api/models/org/tiny/revision/v1?blobs=true" in endpoint
    assert listing.checksums == {
        SHARD: Checksum(sha256="a" * 64, size=7),
        "config.json": Checksum(git_sha1=git_sha1(b"{}"), size=2),
    }
