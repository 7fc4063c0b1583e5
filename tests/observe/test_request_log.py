import io
import json
import logging
from datetime import UTC, datetime, timedelta

import pytest

from sapwood.observe.request_log import (
    MAX_SHOWN,
    HourlyFiles,
    RequestLog,
    StreamSink,
    open_sinks,
    write_event,
)

ASKED = {
    "n": 1,
    "sampling_params": {"temperature": 0.5},
    "prompt": "p" * (MAX_SHOWN + 3),
}
OUT = {"finish_reason": ["stop"], "text": ["t" * (MAX_SHOWN + 1)]}


def logged(level: int, *, as_json: bool = True) -> list[str]:
    stream = io.StringIO()
    log = RequestLog([StreamSink(stream)], enabled=True, level=level, as_json=as_json)
    log.received("r1", ASKED)
    log.finished("r1", ASKED, OUT)
    return stream.getvalue().splitlines()


def test_json_lines_have_the_fields_that_readers_expect():
    received, finished = map(json.loads, logged(0))
    assert set(received) == {"timestamp", "event", "rid", "obj"}
    assert (received["event"], finished["event"]) == ("request.received", "request.finished")
    assert received["rid"] == "r1"
    assert datetime.fromisoformat(received["timestamp"]).tzinfo is not None
    assert finished["out"] == {"finish_reason": ["stop"]}


@pytest.mark.parametrize(
    ("level", "shown"),
    [(0, {"n"}), (1, {"n", "sampling_params"}), (2, set(ASKED)), (3, set(ASKED))],
)
def test_levels_show_more_and_more(level, shown):
    received, finished = map(json.loads, logged(level))
    assert set(received["obj"]) == shown
    assert ("text" in finished["out"]) is (level >= 2)


def test_level_2_cuts_and_level_3_does_not():
    cut, _ = map(json.loads, logged(2))
    assert cut["obj"]["prompt"] == "p" * MAX_SHOWN + "… (3 more characters)"
    whole, finished = map(json.loads, logged(3))
    assert whole["obj"]["prompt"] == ASKED["prompt"]
    assert finished["out"]["text"] == OUT["text"]


def test_token_ids_are_cut_too():
    stream = io.StringIO()
    log = RequestLog([StreamSink(stream)], enabled=True, level=2, as_json=True)
    log.received("r", {"prompt": list(range(MAX_SHOWN + 5))})
    assert json.loads(stream.getvalue())["obj"]["prompt"][-1] == "… (5 more)"


def test_a_line_of_text_is_one_line_whatever_it_shows():
    stream = io.StringIO()
    log = RequestLog([StreamSink(stream)], enabled=True, level=3, as_json=False)
    log.received('r"\n', {"prompt": "one\ntwo\rthree\x1b[2J"})
    assert stream.getvalue().count("\n") == 1
    assert stream.getvalue().isprintable() is False  # only because of its end
    assert stream.getvalue()[:-1].isprintable()
    assert ' request.received rid="r\\"\\n" obj={"prompt":"one\\ntwo' in stream.getvalue()


def test_broken_text_is_logged_all_the_same():
    stream = io.StringIO()
    write_event([StreamSink(stream)], "e", {"rid": "\ud800"}, as_json=False)
    assert "e rid=" in stream.getvalue()
    write_event([StreamSink(stream)], "e", {"rid": "\ud800"}, as_json=True)
    assert "ud800" in json.loads(stream.getvalue().splitlines()[1])


def test_nothing_is_written_while_it_is_off():
    stream = io.StringIO()
    log = RequestLog([StreamSink(stream)])
    log.received("r", ASKED)
    log.finished("r", ASKED, OUT)
    assert stream.getvalue() == ""
    assert not log.wants_text


def test_files_change_with_the_hour(tmp_path):
    now = [datetime(2026, 1, 31, 23, 59, 59, tzinfo=UTC)]
    files = HourlyFiles(tmp_path / "logs", "requests", now=lambda: now[0])
    files.write("one")
    files.write("two")
    now[0] += timedelta(seconds=2)
    files.write("three")
    files.close()
    first, second = sorted((tmp_path / "logs").iterdir())
    assert first.name.startswith("requests-")
    assert first.name.endswith("-20260131-23.log")
    assert second.name.endswith("-20260201-00.log")
    assert (first.read_text(), second.read_text()) == ("one\ntwo\n", "three\n")


def test_a_directory_that_cannot_be_written_costs_lines_and_one_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    files = HourlyFiles(tmp_path / "file" / "logs", "requests")
    with caplog.at_level(logging.WARNING):
        files.write("one")
        files.write("two")
    assert [record.message[:15] for record in caplog.records] == ["the request log"]


def test_a_closed_stream_is_survived():
    stream = io.StringIO()
    sink = StreamSink(stream)
    stream.close()
    sink.write("one")


def test_targets_become_sinks(tmp_path, capsys):
    stdout, files = open_sinks(("stdout", str(tmp_path)), "requests")
    stdout.write("a line")
    files.write("a line")
    stdout.close()
    files.close()
    assert capsys.readouterr().out == "a line\n"
    assert [path.read_text() for path in tmp_path.iterdir()] == ["a line\n"]
