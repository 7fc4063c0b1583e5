import asyncio
import io
import json
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sapwood.base.errors import EngineUnavailable, InvalidRequest, SapwoodError
from sapwood.observe.call import Call, current_call
from sapwood.observe.metrics import Metrics
from sapwood.observe.request_log import RequestLog, StreamSink
from sapwood.observe.requests import Asked, RequestObserver
from sapwood.schema.request import RequestOptions


def chunk(index=0, tokens=1, finish=None, total=1, text="x"):
    return SimpleNamespace(
        index=index,
        text=text,
        token_ids=tuple(range(tokens)),
        finish=None if finish is None else SimpleNamespace(kind=finish, message="why", status=500),
        num_prompt_tokens=5,
        num_output_tokens=total,
        num_cached_tokens=2,
        queue_time_s=0.25,
    )


def asked(n=1):
    return Asked(request_id="r", prompt="hello", n=n, options=RequestOptions())


class EngineFailed(SapwoodError):
    status = 503


@pytest.fixture
def observer():
    return RequestObserver(Metrics("m"))


def run(observer, chunks, error=None, n=1):
    try:
        with observer.observing([asked(n)]) as [one]:
            for each in chunks:
                one.chunk(each)
            if error is not None:
                raise error
    except BaseException as raised:
        if raised is not error:
            raise
    return observer.metrics.series(())


def test_a_finished_request_is_counted_and_timed(observer):
    series = run(observer, [chunk(), chunk(tokens=3), chunk(finish="stop", total=5)])
    assert (series.num_requests, series.num_finished, series.num_open) == (1, 1, 0)
    assert (series.prompt_tokens, series.cached_tokens, series.generation_tokens) == (5, 2, 5)
    assert sum(series.ttft.counts) == 1
    assert sum(series.itl.counts) == 4
    assert sum(series.e2e.counts) == 1
    assert series.queue_time.total == 0.25
    assert series.output_lengths.total == 5
    assert observer.itl.percentiles([0.5])[0] is not None


def test_a_prompt_counts_once_and_each_sample_has_its_first_token(observer):
    chunks = [chunk(0), chunk(1), chunk(0, finish="stop"), chunk(1, finish="length")]
    series = run(observer, chunks, n=2)
    assert (series.prompt_tokens, series.num_finished) == (5, 1)
    assert sum(series.ttft.counts) == 2
    assert sum(series.itl.counts) == 2
    assert sum(series.e2e.counts) == 2


def test_a_chunk_without_tokens_is_no_interval(observer):
    series = run(observer, [chunk(), chunk(tokens=0), chunk(tokens=0, finish="stop")])
    assert sum(series.itl.counts) == 0
    assert series.generation_tokens == 1


@pytest.mark.parametrize(
    ("chunks", "error", "outcome"),
    [
        ([chunk(finish="stop")], None, "finished"),
        ([chunk(finish="stop")], GeneratorExit(), "finished"),
        ([chunk(finish="abort")], None, "aborted"),
        ([chunk()], GeneratorExit(), "aborted"),
        ([chunk()], asyncio.CancelledError(), "aborted"),
        ([], asyncio.CancelledError(), "aborted"),
        ([], InvalidRequest("no"), "refused"),
        ([], EngineUnavailable("no"), "refused"),
        ([], EngineFailed("the queue is full"), "refused"),
        ([chunk(), chunk(tokens=0, finish="error")], EngineFailed("died"), "failed"),
        ([], RuntimeError("a bug"), "failed"),
    ],
)
def test_every_end_has_its_counter(observer, chunks, error, outcome):
    series = run(observer, chunks, error)
    found = {
        "finished": series.num_finished,
        "aborted": series.num_aborted - series.num_failed,
        "failed": series.num_failed,
        "refused": series.num_refused,
    }
    assert found == {name: int(name == outcome) for name in found}
    assert series.num_open == 0


ENDS = st.sampled_from(
    [
        ([chunk(finish="stop")], None),
        ([chunk(finish="abort")], None),
        ([chunk()], GeneratorExit()),
        ([], InvalidRequest("no")),
        ([chunk(finish="error")], EngineFailed("died")),
    ]
)


@given(st.lists(ENDS, max_size=30), st.integers(0, 3))
def test_requests_always_add_up(ends, num_open):
    observer = RequestObserver(Metrics("m"))
    for chunks, error in ends:
        run(observer, chunks, error)
    contexts = [observer.observing([asked()]) for _ in range(num_open)]
    for context in contexts:
        context.__enter__()
    totals = observer.metrics.totals()
    assert totals.num_open == num_open
    assert totals.num_requests == (
        totals.num_finished + totals.num_aborted + totals.num_refused + totals.num_open
    )
    for context in contexts:
        context.__exit__(None, None, None)


def test_requests_carry_their_calls_labels():
    observer = RequestObserver(Metrics("m", custom_labels=("tenant",)))
    token = current_call.set(Call(path="/generate", labels=("a",)))
    run(observer, [chunk(finish="stop")])
    current_call.reset(token)
    assert observer.metrics.series(("a",)).num_finished == 1
    assert observer.metrics.series(()).num_finished == 0


def test_an_answer_without_tokens_is_a_finished_request(observer):
    answer = SimpleNamespace(
        finish=SimpleNamespace(kind="length", message=None, status=200),
        num_prompt_tokens=7,
        num_cached_tokens=0,
        queue_time_s=0.0,
    )
    with observer.observing([asked(), asked()]) as observed:
        for one in observed:
            one.answered(answer)
    series = observer.metrics.series(())
    assert (series.num_finished, series.prompt_tokens) == (2, 14)
    assert sum(series.ttft.counts) == 0


def test_the_log_has_both_ends():
    stream = io.StringIO()
    log = RequestLog([StreamSink(stream)], enabled=True, level=2, as_json=True)
    run(RequestObserver(Metrics("m"), log=log), [chunk(), chunk(finish="stop", text="y")])
    received, finished = map(json.loads, stream.getvalue().splitlines())
    assert received["obj"]["prompt"] == "hello"
    assert finished["out"]["text"] == ["xy"]
    assert finished["out"]["outcome"] == "finished"
    assert finished["out"]["ttft"] > 0


def test_a_crash_dump_has_open_and_ended_requests(tmp_path):
    observer = RequestObserver(Metrics("m"), crash_dump_folder=tmp_path, about={"model": "m"})
    run(observer, [chunk(finish="stop")])
    with observer.observing([asked()]) as [one]:
        one.chunk(chunk(text="half"))
        path = observer.write_crash_dump("it broke")
        one.chunk(chunk(finish="stop"))
    dumped = json.loads(path.read_text())
    assert [record["outcome"] for record in dumped["requests"]] == ["finished", "open"]
    assert dumped["requests"][1]["text"] == ["half"]
    assert dumped["model"] == "m"


def test_without_a_folder_no_text_is_kept(observer):
    assert not observer.keeps_text
    assert observer.write_crash_dump("it broke") is None


def test_the_folder_may_change_while_requests_are_open(observer, tmp_path):
    with observer.observing([asked()]) as [one]:
        observer.set_crash_dump_folder(tmp_path)
        one.chunk(chunk(finish="stop"))
    with observer.observing([asked()]) as [one]:
        observer.set_crash_dump_folder(None)
        one.chunk(chunk(finish="stop"))
    assert observer.metrics.totals().num_finished == 2
