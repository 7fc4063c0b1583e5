import json
from contextlib import closing

import httpx
import pytest

from sapwood.app.cli.chat_backends import InProcess, Piece, Remote
from sapwood.base.errors import EngineUnavailable, InvalidRequest, SapwoodError
from sapwood.schema.output import Finish
from sapwood.text.generation import TextChunk

QUESTION = [{"role": "user", "content": "Hello"}]


def event(delta=None, finish=None, **more):
    choices = [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish}]
    return f"data: {json.dumps({'choices': choices, **more})}\n\n"


class Server:
    """A server that lists two models and answers with the given body."""

    def __init__(self, body="", status=200, models=None):
        self.body, self.status = body, status
        self.models = [{"id": "first"}, {"id": "second"}] if models is None else models
        self.requests = []

    def __call__(self, request):
        self.requests.append(request)
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": self.models})
        return httpx.Response(self.status, content=self.body.encode())

    def connect(self, url="http://example.com:30000", **options):
        settings = {"model": None, "api_key": None, "sampling": {}, **options}
        return Remote(url, transport=httpx.MockTransport(self), **settings)


HELLO = (
    event({"role": "assistant", "content": ""})
    + event({"reasoning_content": "hm"})
    + event({"content": "Hel"})
    + ": a comment\n\n"
    + event({"content": "lo"}, "stop")
    + event(usage={"completion_tokens": 2})
    + "data: [DONE]\n\n"
)


def test_pieces_come_with_reasoning_apart_and_the_count_at_the_end():
    pieces = list(Server(HELLO).connect().answer(QUESTION))
    assert pieces == [
        Piece(text="hm", is_reasoning=True),
        Piece(text="Hel"),
        Piece(text="lo"),
        Piece(text="", num_output_tokens=2),
    ]


def test_what_is_sent():
    server = Server(HELLO)
    sampling = {"temperature": 0.5, "max_new_tokens": 9}
    remote = server.connect(model="mine", api_key="secret", sampling=sampling)
    list(remote.answer(QUESTION))
    [request] = server.requests
    assert request.url == "http://example.com:30000/v1/chat/completions"
    assert request.headers["authorization"] == "Bearer secret"
    assert json.loads(request.content) == {
        "model": "mine",
        "messages": QUESTION,
        "stream": True,
        "stream_options": {"include_usage": True},
        "temperature": 0.5,
        "max_tokens": 9,
    }


def test_without_a_key_none_is_sent():
    server = Server(HELLO)
    list(server.connect(model="mine").answer(QUESTION))
    assert "authorization" not in server.requests[0].headers


@pytest.mark.parametrize("url", ["http://h", "http://h/", "http://h/v1", "http://h/v1/"])
def test_the_url_may_have_its_v1(url):
    server = Server()
    server.connect(url)
    assert server.requests[0].url == "http://h/v1/models"


def test_the_first_model_is_taken_unless_one_is_named():
    assert Server().connect().model == "first"
    server = Server()
    assert server.connect(model="second").model == "second"
    assert server.requests == []


def test_a_server_without_models_is_refused():
    with pytest.raises(EngineUnavailable, match="--model"):
        Server(models=[]).connect()


@pytest.mark.parametrize("url", ["example.com", "ftp://example.com", "http://", "http://h:http"])
def test_what_is_no_url_is_refused(url):
    with pytest.raises(InvalidRequest, match="--url"):
        Server().connect(url)


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ('{"error": {"message": "too long"}}', "too long"),
        ('{"message": "too long"}', "too long"),
        ('{"error": "too long"}', "too long"),
        ("<html>bad gateway</html>", "<html>bad gateway</html>"),
        ("", "no reason given"),
        ("[1]", "[1]"),
    ],
)
def test_a_refusal_is_told_in_the_server_s_words(body, reason):
    with pytest.raises(SapwoodError) as refused:
        list(Server(body, status=400).connect().answer(QUESTION))
    assert refused.value.message == f"the server answers with status 400: {reason}"


def test_an_error_inside_the_stream_is_an_error():
    body = event({"content": "Hel"}) + 'data: {"error": {"message": "out of pages"}}\n\n'
    pieces = Server(body).connect().answer(QUESTION)
    assert next(pieces).text == "Hel"
    with pytest.raises(SapwoodError, match="out of pages"):
        next(pieces)


@pytest.mark.parametrize("data", ["Hello", "[1]"])
def test_an_event_of_another_kind_is_an_error(data):
    with pytest.raises(SapwoodError, match="no JSON object"):
        list(Server(f"data: {data}\n\n").connect().answer(QUESTION))


def test_a_chunk_may_have_nulls():
    body = 'data: {"choices": null, "usage": null}\n\n' + event(None) + event({"content": None})
    assert list(Server(body + "data: [DONE]\n\n").connect().answer(QUESTION)) == []


def test_a_stream_that_is_cut_off_is_an_error():
    with pytest.raises(EngineUnavailable, match="ended before the answer did"):
        list(Server(event({"content": "Hel"})).connect().answer(QUESTION))


def test_a_stream_may_end_without_done():
    assert len(list(Server(event({"content": "a"}, "stop")).connect().answer(QUESTION))) == 1


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(EngineUnavailable, match=r"http://127\.0\.0\.1:9/v1 does not answer"):
        Remote("http://127.0.0.1:9", model=None, api_key=None, sampling={})


def test_closing_the_answer_closes_the_connection():
    class Body(httpx.SyncByteStream):
        closed = False

        def __iter__(self):
            while True:
                yield event({"content": "more "}).encode()

        def close(self):
            Body.closed = True

    transport = httpx.MockTransport(lambda request: httpx.Response(200, stream=Body()))
    remote = Remote("http://h", model="m", api_key=None, sampling={}, transport=transport)
    with closing(remote.answer(QUESTION)) as pieces:
        assert next(pieces).text == "more "
    assert Body.closed
    remote.close()


class StreamingLLM:
    def __init__(self, services):
        self.services = services
        self.calls = []
        self.was_closed = self.stream_was_closed = False

    def stream_chat(self, messages, sampling):
        self.calls.append((messages, sampling))
        try:
            for i, text in enumerate(["Hel", "lo"], start=1):
                yield TextChunk(
                    index=0,
                    text=text,
                    token_ids=(i,),
                    finish=Finish(kind="stop") if i == 2 else None,
                    num_prompt_tokens=5,
                    num_output_tokens=i,
                    num_cached_tokens=0,
                    queue_time_s=0.0,
                )
        finally:
            self.stream_was_closed = True

    def close(self):
        self.was_closed = True


def test_in_process(make_services):
    llm = StreamingLLM(make_services()[0])
    backend = InProcess(llm, {"temperature": 0.0})
    assert backend.model == "scripted"
    assert list(backend.answer(QUESTION)) == [
        Piece(text="Hel", num_output_tokens=1),
        Piece(text="lo", num_output_tokens=2),
    ]
    assert llm.calls == [(QUESTION, {"temperature": 0.0, "max_new_tokens": None})]
    backend.close()
    assert llm.was_closed


def test_in_process_a_limit_that_was_asked_for_is_kept(make_services):
    llm = StreamingLLM(make_services()[0])
    list(InProcess(llm, {"max_new_tokens": 5}).answer(QUESTION))
    assert llm.calls[0][1] == {"max_new_tokens": 5}


def test_in_process_closing_the_answer_stops_it(make_services):
    llm = StreamingLLM(make_services()[0])
    with closing(InProcess(llm, {}).answer(QUESTION)) as pieces:
        next(pieces)
        assert not llm.stream_was_closed
    assert llm.stream_was_closed
