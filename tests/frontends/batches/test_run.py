import asyncio
import json
import threading

import pytest

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.frontends.batches.lines import to_post
from sapwood.frontends.batches.run import LineRun, count_lines, numbered_lines, resume
from sapwood.frontends.server import inner_app
from sapwood.http.in_process import in_process


def jsonl(*lines):
    return [json.dumps(line).encode() + b"\n" for line in lines]


def line_run(services, lines, *, write, done=(), in_flight=4, on_line=lambda tally: None):
    return LineRun(
        lines,
        to_post=lambda line: to_post(line, services),
        post=in_process(inner_app(services)),
        why_gone=lambda: services.engine.unavailable_reason,
        done=done,
        write=lambda reply: write(reply.encoded),
        in_flight=in_flight,
        on_line=on_line,
    )


def run(services, lines, *, done=(), in_flight=4, on_line=lambda tally: None):
    written = []
    batch = line_run(
        services, lines, write=written.append, done=done, in_flight=in_flight, on_line=on_line
    )
    tally = asyncio.run(batch.run())
    assert all(line.endswith(b"\n") for line in written)
    return tally, [json.loads(line) for line in written]


def chat_line(name, **body):
    messages = [{"role": "user", "content": f"I am {name}"}]
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"messages": messages, **body},
    }


def test_every_line_is_answered_in_its_own_format(make_services):
    services, engine = make_services()
    lines = jsonl(
        {"id": "a", "prompt": "one"},
        {"id": 2, "messages": [{"role": "user", "content": "two"}]},
        chat_line("c"),
        {
            "custom_id": "d",
            "method": "POST",
            "url": "/v1/completions",
            "body": {"prompt": "four", "max_tokens": 2},
        },
    )
    tally, answers = run(services, lines)
    by_key = {str(answer.get("custom_id", answer["id"])): answer for answer in answers}
    assert set(by_key) == {"a", "2", "c", "d"}
    assert by_key["a"]["text"] == by_key["2"]["text"] == "Hi."
    chat = by_key["c"]["response"]["body"]
    assert chat["choices"][0]["message"]["content"] == "Hi."
    assert by_key["d"]["response"]["body"]["choices"][0]["text"] == "Hi"
    assert (tally.num_lines, tally.num_failed, tally.num_output_tokens) == (4, 0, 4 + 4 + 4 + 2)
    assert "one" in engine.prompts
    assert "four" in engine.prompts


def test_a_bad_line_is_answered_with_an_error_and_the_rest_goes_on(make_services):
    services, _ = make_services()
    lines = [
        b"not json\n",
        *jsonl(
            chat_line("refused", top_logprobs=5),
            chat_line("elsewhere", model="gpt-4o"),
            {"id": "long", "prompt": "x" * 300},
            {"id": "odd", "prompt": "x", "sampling_params": {"temperature": -1}},
            {"id": "good", "prompt": "x"},
        ),
    ]
    tally, answers = run(services, lines)
    assert (tally.num_lines, tally.num_failed) == (6, 5)
    by_key = {answer.get("custom_id", answer["id"]): answer for answer in answers}
    assert "line 1: the line is not JSON" in by_key["line-1"]["error"]["message"]
    assert by_key["refused"]["response"]["status_code"] == 400
    assert "logprobs" in by_key["refused"]["response"]["body"]["message"]
    assert by_key["elsewhere"]["response"]["status_code"] == 404
    assert by_key["long"]["error"]["code"] == 400
    assert "temperature" in by_key["odd"]["error"]["message"]
    assert by_key["good"]["text"] == "Hi."


def test_blank_lines_are_passed_over_but_counted_in_numbers(make_services):
    services, _ = make_services()
    _, answers = run(services, [b"\n", b"  \n", *jsonl({"prompt": "x"})])
    assert [answer["id"] for answer in answers] == ["line-3"]


def test_lines_that_are_done_are_skipped(make_services):
    services, engine = make_services()
    lines = jsonl({"id": "a", "prompt": "one"}, {"id": 2, "prompt": "two"}, chat_line("c"))
    tally, answers = run(services, lines, done={"a", "2"})
    assert [answer["custom_id"] for answer in answers] == ["c"]
    assert (tally.num_lines, tally.num_skipped) == (1, 2)
    assert len(engine.prompts) == 1


def test_an_id_that_comes_twice_is_answered_once(make_services):
    services, engine = make_services()
    lines = jsonl({"id": "a", "prompt": "one"}, {"id": "a", "prompt": "two"})
    tally, answers = run(services, lines, in_flight=1)
    assert engine.prompts == ["one"]
    assert [answer["id"] for answer in answers] == ["a", "line-2"]
    assert "'a' is that of line 1 too" in answers[1]["error"]["message"]
    assert tally.num_failed == 1


@pytest.mark.parametrize("in_flight", [1, 3])
def test_so_many_lines_are_in_flight_and_no_more(make_services, in_flight):
    services, engine = make_services(step_s=0.01)  # longer than it takes to read a line
    lines = jsonl(*({"id": i, "prompt": "x"} for i in range(12)))
    tally, _ = run(services, lines, in_flight=in_flight)
    assert tally.num_lines == 12
    assert engine.most_open == in_flight


def test_lines_are_read_as_they_are_needed(make_services):
    services, _ = make_services()
    read = []

    def lines():
        for i in range(50):
            read.append(i)
            yield from jsonl({"id": i, "prompt": "x"})

    most_ahead = []
    run(
        services,
        lines(),
        in_flight=2,
        on_line=lambda tally: most_ahead.append(len(read) - tally.num_lines),
    )
    assert len(read) == 50
    assert max(most_ahead) <= 2


def test_a_full_queue_is_asked_again(make_services):
    services, engine = make_services(num_full=3)
    tally, answers = run(services, jsonl({"id": "a", "prompt": "x"}, chat_line("c")))
    assert engine.num_full == 0
    assert (tally.num_lines, tally.num_failed) == (2, 0)
    assert len(answers) == 2


def test_a_dead_engine_ends_the_run_without_answers_for_the_rest(make_services):
    services, _ = make_services(die_after=3)
    written = []
    lines = jsonl(*({"id": i, "prompt": "x"} for i in range(10)))
    batch = line_run(services, lines, write=written.append, in_flight=2)
    with pytest.raises(EngineUnavailable, match="the engine process was killed"):
        asyncio.run(batch.run())
    assert len(written) == 3
    assert all(json.loads(line)["error"] is None for line in written)


def test_stop_ends_the_run_and_aborts_what_is_open(make_services):
    services, engine = make_services(hangs=True)
    written = []
    lines = jsonl(*({"id": i, "prompt": "x"} for i in range(10)))
    batch = line_run(services, lines, write=written.append, in_flight=3)

    async def run_and_stop():
        running = asyncio.create_task(batch.run())
        while engine.num_open < 3:
            await asyncio.sleep(0.001)
        threading.Thread(target=batch.stop).start()
        return await asyncio.wait_for(running, 10)

    tally = asyncio.run(run_and_stop())
    assert engine.num_open == 0
    assert (tally.num_lines, written) == (0, [])


def test_stop_before_the_run_answers_nothing(make_services):
    services, engine = make_services()
    batch = line_run(services, jsonl({"prompt": "x"}), write=lambda _: None, in_flight=1)
    batch.stop()
    assert asyncio.run(batch.run()).num_lines == 0
    assert engine.prompts == []


def test_each_line_is_told(make_services):
    services, _ = make_services()
    seen = []
    lines = jsonl(*({"id": i, "prompt": "x"} for i in range(4)))
    run(
        services,
        lines,
        done={"0"},
        on_line=lambda tally: seen.append(tally.num_lines + tally.num_skipped),
    )
    assert seen == [1, 2, 3, 4]


@pytest.fixture
def output(tmp_path):
    path = tmp_path / "out.jsonl"
    path.write_bytes(
        b'{"id": "a", "text": "x", "error": null}\n'
        b'{"id": "r1", "custom_id": "b", "response": {"status_code": 400}, "error": null}\n'
        b'{"id": 3, "error": {"message": "no"}}\n'
    )
    return path


def test_a_new_output_has_nothing_done(tmp_path):
    assert resume(tmp_path / "none.jsonl", retry_errors=False) == set()
    assert not (tmp_path / "none.jsonl").exists()


def test_an_output_tells_what_is_done_and_stays_as_it_is(output):
    before = output.read_bytes()
    assert resume(output, retry_errors=False) == {"a", "b", "3"}
    assert output.read_bytes() == before


@pytest.mark.parametrize("half", [b'{"id": "half', b'{"id": "whole", "error": null}'])
def test_half_a_line_at_the_end_is_cut_off(output, half):
    before = output.read_bytes()
    output.write_bytes(before + half)
    assert resume(output, retry_errors=False) == {"a", "b", "3"}
    assert output.read_bytes() == before


@pytest.mark.parametrize("tail", [b"", b'{"id": "half'])
def test_failed_lines_can_be_taken_out(output, tail):
    first = output.read_bytes().splitlines(keepends=True)[0]
    output.write_bytes(output.read_bytes() + tail)
    assert resume(output, retry_errors=True) == {"a"}
    assert output.read_bytes() == first
    assert list(output.parent.iterdir()) == [output]


@pytest.mark.parametrize("line", [b"important notes\n", b"[]\n", b'{"prompt": "x"}\n'])
def test_another_file_is_not_touched(output, line):
    before = output.read_bytes() + line + b"half"
    output.write_bytes(before)
    with pytest.raises(ConfigError, match=r"line 4 of .*out.jsonl is no answer"):
        resume(output, retry_errors=True)
    assert output.read_bytes() == before


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_bytes(b"\xef\xbb\xbf{}\n\n[]")
    with path.open("rb") as file:
        assert list(numbered_lines(file)) == [b"{}\n", b"\n", b"[]"]
    assert count_lines(path) == 2
