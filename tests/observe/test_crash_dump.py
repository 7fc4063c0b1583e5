import json
import logging
import stat
import time

from sapwood.observe import crash_dump
from sapwood.observe.crash_dump import KEPT_S, RecentRequests, RequestDump, write_crash_dump


def test_open_and_recent_requests_are_kept_for_five_minutes():
    now = [0.0]
    recent = RecentRequests(now_s=lambda: now[0])
    recent.begin(1, lambda: {"rid": "old"})
    recent.end(1, {"rid": "old", "prompt": "abc"})
    now[0] = KEPT_S - 1
    recent.begin(2, lambda: {"rid": "open", "outcome": "open"})
    assert [one["rid"] for one in recent.records()] == ["old", "open"]
    now[0] = KEPT_S + 1
    assert [one["rid"] for one in recent.records()] == ["open"]


def test_the_oldest_go_first_when_texts_are_large(monkeypatch):
    monkeypatch.setattr(crash_dump, "MAX_KEPT_CHARS", 100)
    recent = RecentRequests()
    for i in range(5):
        recent.begin(i, dict)
        recent.end(i, {"rid": i, "prompt": "p" * 40})
    assert [one["rid"] for one in recent.records()] == [3, 4]


def test_a_dump_is_json_that_only_its_owner_reads(tmp_path):
    records = [{"rid": "a", "prompt": "p\ud800"[:1], "text": ["t"]}]
    path = write_crash_dump(tmp_path / "dumps", "it broke", records, {"version": "1"})
    content = json.loads(path.read_text())
    assert content["reason"] == "it broke"
    assert content["version"] == "1"
    assert content["requests"] == records
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_dump_that_cannot_be_written_is_only_reported(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.ERROR):
        assert write_crash_dump(tmp_path / "file" / "x", "why", [], {}) is None
    assert "could not be written" in caplog.text


def test_requests_are_dumped_in_files_of_so_many(tmp_path):
    dump = RequestDump(tmp_path, 2)
    for i in range(5):
        dump.add({"rid": i})
    dump.flush()
    end = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) < 3 or any(
        not path.read_bytes().endswith(b"\n") for path in tmp_path.iterdir()
    ):
        assert time.monotonic() < end
        time.sleep(0.01)
    files = sorted(tmp_path.iterdir(), key=lambda path: path.name.rsplit("-", 1)[1])
    texts = [path.read_text() for path in files]
    lines = [[json.loads(line)["rid"] for line in text.splitlines()] for text in texts]
    assert lines == [[0, 1], [2, 3], [4]]
