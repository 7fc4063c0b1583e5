import io
import json
import os
import signal
import threading
import time
from types import SimpleNamespace

import pytest

from sapwood.app.cli import generate as generate_module
from sapwood.app.cli.generate import Answered, summary
from sapwood.app.cli.main import main
from sapwood.frontends.batches.run import Tally


@pytest.fixture
def llm(monkeypatch, make_llm):
    """The scripted engine that the command opens, and what it was opened with."""
    fake, engine = make_llm()
    fake.engine = engine
    fake.configs = []

    def open_llm(config):
        fake.configs.append(config)
        return fake

    monkeypatch.setattr(generate_module, "open_llm", open_llm)
    return fake


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "in.jsonl"
    lines = [{"id": i, "prompt": f"prompt {i}"} for i in range(5)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers_in(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_file_is_answered(llm, source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    assert main(["generate", str(source), "-o", str(target), "--page-size", "8"]) == 0
    answers = answers_in(target)
    assert sorted(answer["id"] for answer in answers) == [0, 1, 2, 3, 4]
    assert {answer["text"] for answer in answers} == {"Hi."}
    assert llm.configs[0].memory.page_size == 8
    assert llm.is_closed
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "5 lines in" in captured.err
    assert "0 with an error; 20 output tokens" in captured.err


def test_a_second_run_goes_on_where_the_first_ended(llm, source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"
    main(["generate", str(source), "-o", str(target)])
    lines = target.read_text().splitlines(keepends=True)
    target.write_text("".join(lines[:2]) + lines[2][:9])
    llm.engine.prompts.clear()
    assert main(["generate", str(source), "-o", str(target)]) == 0
    assert sorted(answer["id"] for answer in answers_in(target)) == [0, 1, 2, 3, 4]
    assert len(llm.engine.prompts) == 3
    assert "3 lines in" in (error := capsys.readouterr().err)
    assert "2 were done before" in error


def test_errors_are_kept_or_asked_again(llm, tmp_path):
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text('{"id": "a", "prompt": "x", "bad": 1}\n')
    assert main(["generate", str(source), "-o", str(target)]) == 0
    source.write_text('{"id": "a", "prompt": "x"}\n')
    assert main(["generate", str(source), "-o", str(target)]) == 0
    assert "bad" in answers_in(target)[0]["error"]["message"]
    assert main(["generate", str(source), "-o", str(target), "--retry-errors"]) == 0
    [answer] = answers_in(target)
    assert answer["text"] == "Hi."


def test_streams(llm, source, monkeypatch):
    out = io.BytesIO()
    stdin = SimpleNamespace(buffer=io.BytesIO(source.read_bytes()))
    stdout = SimpleNamespace(buffer=out)
    monkeypatch.setattr(generate_module, "sys", SimpleNamespace(stdin=stdin, stdout=stdout))
    assert main(["generate", "-", "-o", "-"]) == 0
    ids = sorted(json.loads(line)["id"] for line in out.getvalue().splitlines())
    assert ids == [0, 1, 2, 3, 4]


def test_errors_of_a_stream_cannot_be_asked_again(source):
    assert main(["generate", str(source), "-o", "-", "--retry-errors"]) == 2


@pytest.mark.parametrize(
    ("source_name", "target_name", "words"),
    [
        ("none.jsonl", "out.jsonl", "is no file"),
        ("in.jsonl", "none/out.jsonl", "its directory must exist"),
        ("in.jsonl", ".", "cannot be written"),
    ],
)
def test_files_are_checked_before_the_model_is_loaded(
    llm, source, tmp_path, capsys, source_name, target_name, words
):
    status = main(["generate", str(tmp_path / source_name), "-o", str(tmp_path / target_name)])
    assert status == 1
    assert words in capsys.readouterr().err
    assert llm.configs == []


def test_a_file_that_is_no_output_is_left_alone(llm, source, tmp_path, capsys):
    target = tmp_path / "notes.txt"
    target.write_text("dear diary\n")
    assert main(["generate", str(source), "-o", str(target)]) == 1
    assert "is no answer of a batch" in capsys.readouterr().err
    assert target.read_text() == "dear diary\n"
    assert llm.configs == []


def test_a_dead_engine_ends_with_1_and_keeps_what_is_done(llm, source, tmp_path, capsys):
    llm.engine.die_after = 2
    target = tmp_path / "out.jsonl"
    assert main(["generate", str(source), "-o", str(target), "--in-flight", "1"]) == 1
    assert "run the command again" in capsys.readouterr().err
    assert len(answers_in(target)) == 2
    assert llm.is_closed


def test_ctrl_c_ends_with_130_and_keeps_what_is_done(llm, source, tmp_path, capsys):
    target = tmp_path / "out.jsonl"

    def interrupt():
        while not target.exists() or len(target.read_bytes().splitlines()) < 2:
            time.sleep(0.001)
        llm.engine.hangs = True
        while llm.engine.num_open < 1:
            time.sleep(0.001)
        os.kill(os.getpid(), signal.SIGINT)

    source.write_text("".join(f'{{"id": {i}, "prompt": "x"}}\n' for i in range(10_000)))
    helper = threading.Thread(target=interrupt)
    helper.start()
    assert main(["generate", str(source), "-o", str(target), "--in-flight", "2"]) == 130
    helper.join()
    answers = answers_in(target)
    assert 2 <= len(answers) < 10_000
    assert all(answer["error"] is None for answer in answers)
    told = capsys.readouterr().err
    assert f"{len(answers)} lines in" in told
    assert f"interrupted: {len(answers)} of 10000 lines have their answer in {target}" in told
    assert llm.is_closed
    llm.engine.hangs = False
    source.write_text("".join(f'{{"id": {i}, "prompt": "x"}}\n' for i in range(len(answers) + 5)))
    assert main(["generate", str(source), "-o", str(target)]) == 0
    assert f"{len(answers)} were done before" in capsys.readouterr().err
    assert sorted(answer["id"] for answer in answers_in(target)) == list(range(len(answers) + 5))


def test_ctrl_c_while_the_model_is_loaded(llm, source, tmp_path, capsys, monkeypatch):
    target = tmp_path / "out.jsonl"
    assert main(["generate", str(source), "-o", str(target)]) == 0
    done = len(answers_in(target))

    def interrupted(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate_module, "open_llm", interrupted)
    capsys.readouterr()
    assert main(["generate", str(source), "-o", str(target)]) == 130
    told = capsys.readouterr().err
    assert f"{done} of 5 lines have their answer in {target}; the same command answers" in told


def test_answers_that_were_only_printed_are_not_kept():
    told = Answered(num_lines=3, total=None).how_to_go_on("-")
    assert told.startswith("interrupted: 3 lines were answered; they are not kept.")
    assert "--output FILE" in told


def test_a_bar_on_a_terminal(llm, source, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(["generate", str(source), "-o", str(tmp_path / "out.jsonl")]) == 0
    shown = capsys.readouterr().err
    assert "5/5" in shown
    assert "tok/s" in shown


def test_the_summary():
    tally = Tally(num_lines=10, num_failed=1, num_skipped=0, num_output_tokens=500)
    assert summary(tally, 2.0) == (
        "10 lines in 2.0 s; 1 with an error; 500 output tokens, 250.0 tok/s"
    )
    assert "0.0 tok/s" in summary(Tally(), 0.0)


def test_wrong_usage(source):
    assert main(["generate", str(source)]) == 2
    assert main(["generate", str(source), "-o", "x", "--in-flight", "0"]) == 2
