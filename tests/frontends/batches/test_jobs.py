"""Files and batches by the official client, over HTTP."""

import json
import time

import httpx
import openai
import pytest

from sapwood.frontends.batches import runner


def chat(name, **body):
    messages = [{"role": "user", "content": f"I am {name}"}]
    return {
        "custom_id": name,
        "method": "POST",
        "url": "/v1/chat/completions",
        "body": {"model": "org/tiny", "messages": messages, **body},
    }


def jsonl(*lines):
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def submit(client, *lines, endpoint="/v1/chat/completions", **options):
    file = client.files.create(file=("in.jsonl", jsonl(*lines)), purpose="batch")
    return client.batches.create(
        input_file_id=file.id, endpoint=endpoint, completion_window="24h", **options
    )


def finished(client, batch, *statuses, limit_s=20.0):
    end = time.monotonic() + limit_s
    while (now := client.batches.retrieve(batch.id)).status not in statuses:
        assert time.monotonic() < end, now
        assert now.status not in ("completed", "failed", "cancelled", "expired"), now
        time.sleep(0.02)
    return now


def lines_of(client, file_id):
    text = client.files.content(file_id).text
    return {answer["custom_id"]: answer for answer in map(json.loads, text.splitlines())}


def test_a_batch_from_upload_to_answers(serve, client_of, engine):
    engine.num_cached_tokens = 3
    client = client_of(serve())
    batch = submit(
        client, chat("a"), chat("b", max_tokens=2), chat("c", top_p=7), metadata={"for": "me"}
    )
    assert batch.status == "validating"
    assert batch.metadata == {"for": "me"}
    done = finished(client, batch, "completed")
    counts = done.request_counts
    assert (counts.total, counts.completed, counts.failed) == (3, 2, 1)
    assert done.model == "org/tiny"
    assert done.created_at <= done.in_progress_at <= done.finalizing_at <= done.completed_at
    answers = lines_of(client, done.output_file_id)
    assert set(answers) == {"a", "b"}
    told = answers["a"]["response"]["body"]["choices"][0]
    assert told["message"]["content"] == "Hello, wörld!"
    assert answers["b"]["response"]["body"]["choices"][0]["finish_reason"] == "length"
    failed = lines_of(client, done.error_file_id)["c"]
    assert failed["response"]["status_code"] == 400
    assert "top_p" in failed["response"]["body"]["message"]
    assert done.usage.output_tokens == 15 + 2
    assert done.usage.input_tokens_details.cached_tokens == 6
    assert {one.options.sampling.max_new_tokens for one in engine.submitted} == {None, 2}


def test_lines_come_below_live_traffic(serve, client_of, engine):
    client = client_of(serve())
    finished(client, submit(client, chat("a"), chat("b")), "completed")
    assert [one.options.priority for one in engine.submitted] == [-100, -100]
    wrong = finished(client, submit(client, chat("a", priority=7)), "failed")
    assert "priority" in wrong.errors.data[0].message


@pytest.mark.parametrize("concurrency", [1, 3])
def test_so_many_lines_are_answered_at_a_time(serve, client_of, engine, until, concurrency):
    engine.hold = True
    client = client_of(serve(concurrency=concurrency))
    batches = [submit(client, *(chat(f"{i}-{j}") for j in range(6))) for i in range(2)]
    for batch in batches:
        finished(client, batch, "in_progress")
    until(lambda: len(engine.held) == concurrency)
    assert len(engine.submitted) == concurrency
    engine.hold = False
    for batch in batches:
        finished(client, batch, "completed")
    assert engine.most_open == concurrency


def test_completions_can_be_batched_and_one_batch_has_one_endpoint(serve, client_of):
    client = client_of(serve())
    line = {"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {"prompt": "x"}}
    done = finished(client, submit(client, line, endpoint="/v1/completions"), "completed")
    body = lines_of(client, done.output_file_id)["a"]["response"]["body"]
    assert body["choices"][0]["text"] == "Hello, wörld!"
    wrong = finished(client, submit(client, line, chat("b")), "failed")
    (problem,) = wrong.errors.data
    assert (problem.line, problem.code, problem.param) == (1, "invalid_request", "url")


def test_a_bad_input_fails_the_batch_and_names_its_lines(serve, client_of, engine):
    client = client_of(serve())
    content = jsonl(chat("a")) + b"{\n\n" + jsonl(chat("a"), chat("s", stream=True))
    file = client.files.create(file=("in.jsonl", content), purpose="batch")
    batch = client.batches.create(
        input_file_id=file.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    failed = finished(client, batch, "failed")
    problems = [(one.line, one.code) for one in failed.errors.data]
    assert problems == [
        (2, "invalid_json_line"),
        (4, "duplicate_custom_id"),
        (5, "invalid_request"),
    ]
    assert failed.failed_at is not None
    assert engine.submitted == []
    blank = client.files.create(file=("in.jsonl", b"\n\n"), purpose="batch")
    empty = client.batches.create(
        input_file_id=blank.id, endpoint="/v1/chat/completions", completion_window="24h"
    )
    assert finished(client, empty, "failed").errors.data[0].code == "empty_file"


def test_cancelling_aborts_what_is_open_and_keeps_what_is_done(serve, client_of, engine, until):
    engine.step_s = 0.001
    client = client_of(serve(concurrency=1))
    batch = submit(client, *(chat(str(i)) for i in range(50)))
    until(lambda: len(engine.submitted) >= 4)
    engine.hold = True
    assert client.batches.cancel(batch.id).status in ("cancelling", "cancelled")
    done = finished(client, batch, "cancelled")
    until(lambda: not engine.open)
    counts = done.request_counts
    assert 2 <= counts.completed < 50
    assert counts.total == 50
    assert len(lines_of(client, done.output_file_id)) == counts.completed
    assert done.cancelling_at <= done.cancelled_at
    assert client.batches.cancel(batch.id).status == "cancelled"
    engine.hold = False
    whole = finished(client, submit(client, chat("a")), "completed")
    with pytest.raises(openai.BadRequestError, match="completed"):
        client.batches.cancel(whole.id)


def test_progress_survives_the_end_of_the_server(serve, client_of, engine, until):
    engine.step_s = 0.001
    first = serve(concurrency=2)
    client = client_of(first)
    batch = submit(client, *(chat(str(i)) for i in range(20)), chat("bad", n=0))
    until(lambda: len(engine.submitted) >= 8)
    engine.hold = True
    first.close()
    assert not engine.open
    engine.hold = False
    num_asked = len(engine.submitted)
    client = client_of(serve(concurrency=2))
    done = finished(client, batch, "completed")
    assert (done.request_counts.completed, done.request_counts.failed) == (20, 1)
    assert len(lines_of(client, done.output_file_id)) == 20
    # Only what was open at the end was asked twice.
    assert len(engine.submitted) <= 20 + 2
    assert len(engine.submitted) > num_asked
    assert done.usage.output_tokens == 20 * 15


def test_a_torn_last_line_is_asked_again(serve, client_of, engine, until):
    engine.step_s = 0.001
    first = serve(concurrency=1)
    batch = submit(client_of(first), *(chat(str(i)) for i in range(6)))
    until(lambda: len(engine.submitted) >= 3)
    engine.hold = True
    first.close()
    engine.hold = False
    contents = {one: one.read_bytes() for one in first.store.path_of("").iterdir()}
    ((path, whole),) = [item for item in contents.items() if b"batch_req" in item[1]]
    path.write_bytes(whole[:-20])
    client = client_of(serve())
    done = finished(client, batch, "completed")
    assert set(lines_of(client, done.output_file_id)) == {str(i) for i in range(6)}


def test_another_server_takes_over_when_the_first_one_ends(serve, client_of, engine):
    engine.hold = True
    first, second = serve(), serve()
    batch = submit(client_of(second), chat("a"))
    assert finished(client_of(second), batch, "in_progress").status == "in_progress"
    first.close()
    engine.hold = False
    finished(client_of(second), batch, "completed")


def test_an_engine_that_is_away_is_waited_for(serve, client_of, engine):
    engine.unavailable_reason = "the engine is starting"
    client = client_of(serve())
    batch = submit(client, chat("a"))
    finished(client, batch, "in_progress")
    for _ in range(20):
        # Each answer is a turn of the very loop that would ask the line.
        client.batches.retrieve(batch.id)
    assert engine.submitted == []
    engine.unavailable_reason = None
    finished(client, batch, "completed")


def test_when_time_is_up_the_rest_gets_errors(serve, client_of, engine, monkeypatch):
    engine.hold = True
    client = client_of(serve())
    batch = submit(client, chat("a"), chat("b"))
    finished(client, batch, "in_progress")
    now = time.time()
    monkeypatch.setattr(runner.time, "time", lambda: now + 25 * 3600)
    done = finished(client, batch, "expired")
    assert done.output_file_id is None
    told = lines_of(client, done.error_file_id)
    assert {one["error"]["code"] for one in told.values()} == {"batch_expired"}
    assert (done.request_counts.failed, set(told)) == (2, {"a", "b"})


def test_batches_are_listed_newest_first_by_pages(serve, client_of):
    client = client_of(serve(runs=False))
    ids = [submit(client, chat(str(i))).id for i in range(5)]
    assert [one.id for one in client.batches.list(limit=2)] == ids[::-1]
    page = client.batches.list(limit=2)
    assert (len(page.data), page.has_more) == (2, True)
    with pytest.raises(openai.BadRequestError, match="after"):
        client.batches.list(after="batch_none")
    with pytest.raises(openai.BadRequestError, match=r"must be in \[1, 100\]"):
        client.batches.list(limit=101)


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"input_file_id": "file-none"}, "input_file_id"),
        ({"endpoint": "/v1/moderations"}, "endpoint"),
        ({"completion_window": "soon"}, "completion_window"),
        ({"metadata": {"k": "v" * 513}}, "metadata"),
        ({"extra_body": {"urgent": True}}, "urgent"),
        ({"output_expires_after": {"anchor": "created_at", "seconds": 1}}, "output_expires_after"),
    ],
)
def test_what_cannot_be_a_batch_is_refused(serve, client_of, changes, param):
    client = client_of(serve(runs=False))
    file = client.files.create(file=("in.jsonl", jsonl(chat("a"))), purpose="batch")
    options = {
        "input_file_id": file.id,
        "endpoint": "/v1/chat/completions",
        "completion_window": "24h",
        **changes,
    }
    with pytest.raises(openai.BadRequestError) as refused:
        client.batches.create(**options)
    assert param in refused.value.param


def test_unknown_batches_are_404(serve, client_of):
    client = client_of(serve(runs=False))
    for call in (client.batches.retrieve, client.batches.cancel):
        with pytest.raises(openai.NotFoundError):
            call("batch_none")


def test_a_server_without_batches_says_so(api):
    for method, path in (("GET", "/v1/files"), ("POST", "/v1/batches"), ("GET", "/v1/batches/b")):
        answer = api.request(method, path)
        assert answer.status_code == 400
        assert "--batch-concurrency" in answer.json()["message"]


def test_a_batch_of_responses(serve, client_of):
    line = {"custom_id": "a", "method": "POST", "url": "/v1/responses", "body": {"input": "Hi"}}
    client = client_of(serve())
    done = finished(client, submit(client, line, endpoint="/v1/responses"), "completed")
    body = lines_of(client, done.output_file_id)["a"]["response"]["body"]
    assert body["output"][0]["content"][0]["text"] == "Hello, wörld!"
    assert done.usage.output_tokens == 15


def test_raw_requests_get_the_status_of_their_mistake(serve):
    server = serve(runs=False)
    url = f"{server.url}/v1/files"
    assert httpx.post(url, json={"file": "x"}).status_code == 400
    assert httpx.post(url, files={"file": ("a", b"x")}).json()["param"] == "purpose"
    assert httpx.post(url, data={"purpose": "batch"}, files={"x": b""}).json()["param"] == "x"
