"""The Responses API by the official client, over HTTP."""

import sqlite3
import time

import httpx
import openai
import pytest

TEXT = "Hello, wörld!"


def ended(client, response, limit_s=10.0):
    end = time.monotonic() + limit_s
    while (now := client.responses.retrieve(response.id)).status in ("queued", "in_progress"):
        assert time.monotonic() < end, now
        time.sleep(0.01)
    return now


def test_a_response(client, prompt_of, engine):
    engine.num_cached_tokens = 4
    answer = client.responses.create(
        model="org/tiny",
        input="Hi",
        instructions="Be brief.",
        temperature=0.5,
        max_output_tokens=50,
        metadata={"for": "me"},
    )
    assert answer.output_text == TEXT
    assert (answer.status, answer.object, answer.model) == ("completed", "response", "org/tiny")
    (message,) = answer.output
    assert (message.type, message.role, message.status) == ("message", "assistant", "completed")
    assert prompt_of() == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    usage = answer.usage
    assert usage.output_tokens == 15
    assert usage.input_tokens_details.cached_tokens == 4
    assert usage.total_tokens == usage.input_tokens + 15
    assert (answer.temperature, answer.top_p, answer.max_output_tokens) == (0.5, 1.0, 50)
    assert engine.submitted[0].options.sampling.max_new_tokens == 50
    assert answer.metadata == {"for": "me"}
    assert answer.created_at <= answer.completed_at
    assert client.responses.retrieve(answer.id) == answer


def test_a_limit_makes_it_incomplete(client):
    answer = client.responses.create(input="Hi", max_output_tokens=5)
    assert (answer.status, answer.output_text) == ("incomplete", "Hello")
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.output[0].status == "incomplete"


EVENTS = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def test_events_come_in_order_and_numbered(client):
    events = list(client.responses.create(input="Hi", stream=True))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert list(dict.fromkeys(kinds)) == EVENTS
    assert len(events) == len(EVENTS) - 1 + len(deltas)
    assert "".join(event.delta for event in deltas) == TEXT
    first, last = events[0].response, events[-1].response
    assert (first.status, first.output, first.usage) == ("in_progress", [], None)
    assert last.output_text == TEXT
    assert last.usage.output_tokens == 15
    assert events[2].item.content == []
    assert events[-2].item == last.output[0]
    assert {event.item_id for event in deltas} == {last.output[0].id}
    assert client.responses.retrieve(last.id) == last


def test_the_client_s_own_accumulator_agrees(client):
    with client.responses.stream(input="Hi", model="org/tiny") as stream:
        for _ in stream:
            pass
        final = stream.get_final_response()
    assert final.output_text == TEXT


def test_events_on_the_wire_have_their_names_and_no_done(server):
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "Hi", "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    parts = answer.text.split("\n\n")
    assert parts[0].startswith("event: response.created\ndata: {")
    assert parts[-2].startswith("event: response.completed\n")
    assert parts[-1] == ""


def test_a_conversation_goes_on_from_a_response(client, prompt_of):
    first = client.responses.create(input="One", instructions="Old rules.")
    second = client.responses.create(
        input=[{"role": "user", "content": [{"type": "input_text", "text": "Two"}]}],
        previous_response_id=first.id,
        instructions="New rules.",
    )
    assert second.previous_response_id == first.id
    third = client.responses.create(input="Three", previous_response_id=second.id)
    assert prompt_of(1).startswith(
        "<|im_start|>system\nNew rules.<|im_end|>\n<|im_start|>user\nOne"
    )
    assert prompt_of(2).split("<|im_end|>\n") == [
        "<|im_start|>user\nOne",
        f"<|im_start|>assistant\n{TEXT}",
        "<|im_start|>user\nTwo",
        f"<|im_start|>assistant\n{TEXT}",
        "<|im_start|>user\nThree",
        "<|im_start|>assistant\n",
    ]
    items = list(client.responses.input_items.list(third.id, order="asc", limit=2))
    assert [item.role for item in items] == ["user", "assistant", "user", "assistant", "user"]
    assert [item.content[0].text for item in items][::2] == ["One", "Two", "Three"]
    newest = list(client.responses.input_items.list(third.id))
    assert [item.id for item in newest] == [item.id for item in items][::-1]
    with pytest.raises(openai.BadRequestError, match="after"):
        client.responses.input_items.list(third.id, after="msg_none")


def test_a_deleted_response_is_gone_and_so_is_its_thread(client):
    first = client.responses.create(input="One")
    second = client.responses.create(input="Two", previous_response_id=first.id)
    client.responses.delete(first.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError, match=first.id):
            call(first.id)
    with pytest.raises(openai.NotFoundError, match=first.id):
        client.responses.create(input="Three", previous_response_id=second.id)
    assert client.responses.retrieve(second.id).output_text == TEXT


def test_what_is_not_stored_is_not_there(client, engine):
    answer = client.responses.create(input="Hi", store=False)
    assert answer.output_text == TEXT
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)
    with pytest.raises(openai.BadRequestError, match="background needs"):
        client.responses.create(input="Hi", store=False, background=True)


def test_conversations_survive_a_restart_unless_they_are_in_memory(serve):
    first = serve()
    answer = first.client.responses.create(input="Hi")
    first.close()
    assert serve().client.responses.retrieve(answer.id).output_text == TEXT
    volatile = serve(in_memory=True)
    answer = volatile.client.responses.create(input="Hi")
    assert volatile.client.responses.retrieve(answer.id).output_text == TEXT


def test_old_responses_are_deleted(serve, monkeypatch):
    first = serve()
    answer = first.client.responses.create(input="Hi")
    first.close()
    tomorrow = time.time() + 86_500
    monkeypatch.setattr(time, "time", lambda: tomorrow)
    second = serve(retention_days=1)
    with pytest.raises(openai.NotFoundError):
        second.client.responses.retrieve(answer.id)


def test_a_background_response(client, engine, until):
    engine.hold = True
    answer = client.responses.create(input="Hi", background=True)
    assert (answer.status, answer.output, answer.background) == ("queued", [], True)
    until(lambda: len(engine.open) == 1)
    assert client.responses.retrieve(answer.id).status == "queued"
    with pytest.raises(openai.BadRequestError, match="has not ended"):
        client.responses.create(input="More", previous_response_id=answer.id)
    engine.hold = False
    done = ended(client, answer)
    assert (done.status, done.output_text) == ("completed", TEXT)
    assert client.responses.cancel(answer.id) == done


def test_a_background_response_is_cancelled(client, engine, until):
    engine.hold = True
    answer = client.responses.create(input="Hi", background=True)
    until(lambda: len(engine.open) == 1)
    assert client.responses.cancel(answer.id).status == "cancelled"
    assert client.responses.retrieve(answer.id).status == "cancelled"
    until(lambda: not engine.open)
    engine.hold = False
    plain = client.responses.create(input="Hi")
    with pytest.raises(openai.BadRequestError, match="background=true"):
        client.responses.cancel(plain.id)


def test_a_background_response_is_deleted_while_it_runs(client, engine, until):
    engine.hold = True
    answer = client.responses.create(input="Hi", background=True)
    until(lambda: len(engine.open) == 1)
    client.responses.delete(answer.id)
    until(lambda: not engine.open)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(answer.id)


def test_a_background_stream_can_be_left_and_taken_up_again(client, engine, until):
    engine.step_s = 0.01
    stream = client.responses.create(input="Hi", background=True, stream=True)
    seen = [next(stream) for _ in range(5)]
    stream.close()
    assert [event.type for event in seen[:3]] == [
        "response.created",
        "response.queued",
        "response.in_progress",
    ]
    response_id = seen[0].response.id
    live = list(client.responses.retrieve(response_id, stream=True, starting_after=4))
    assert [event.sequence_number for event in live] == list(range(5, 5 + len(live)))
    assert live[-1].type == "response.completed"
    assert live[-1].response.output_text == TEXT
    assert not engine.abandoned
    until(lambda: client.responses.retrieve(response_id).status == "completed")
    replayed = list(client.responses.retrieve(response_id, stream=True))
    assert [event.sequence_number for event in replayed] == list(range(5 + len(live)))
    assert replayed[5:] == live
    assert list(client.responses.retrieve(response_id, stream=True, starting_after=999)) == []


def test_other_responses_cannot_be_streamed_again(client):
    answer = client.responses.create(input="Hi")
    with pytest.raises(openai.BadRequestError, match="background=true and stream=true"):
        client.responses.retrieve(answer.id, stream=True)
    with pytest.raises(openai.BadRequestError, match="starting_after"):
        client.responses.retrieve(answer.id, starting_after=1)


def test_what_a_dead_server_had_open_has_failed(serve, engine, until, tmp_path):
    first = serve()
    answer = first.client.responses.create(input="Hi")
    first.close()
    with sqlite3.connect(tmp_path / "responses.sqlite") as database:
        database.execute(
            "UPDATE responses SET is_open = 1, record = json_set(record, '$.status', 'in_progress')"
        )
    database.close()
    failed = serve().client.responses.retrieve(answer.id)
    assert (failed.status, failed.error.code) == ("failed", "server_error")


def test_a_client_that_leaves_ends_the_work_and_what_there_is_stays(client, engine, until):
    engine.step_s = 0.02
    stream = client.responses.create(input="Hi", stream=True)
    events = [next(stream) for _ in range(6)]
    stream.close()
    until(lambda: len(engine.abandoned) == 1)
    response_id = events[0].response.id
    until(lambda: client.responses.retrieve(response_id).status == "cancelled")
    left = client.responses.retrieve(response_id)
    assert left.output_text
    assert TEXT.startswith(left.output_text)
    assert left.output[0].status == "incomplete"


def test_a_failure_before_the_first_token_has_its_own_status(client, engine):
    engine.fail_after = 0
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError, match="out of pages") as failed:
            client.responses.create(input="Hi", stream=stream)
        assert failed.value.status_code == 503


def test_a_failure_later_is_told_as_an_event(client, engine):
    engine.fail_after = 3
    events = list(client.responses.create(input="Hi", stream=True))
    assert events[-1].type == "response.failed"
    failed = events[-1].response
    assert (failed.status, failed.error.code) == ("failed", "server_error")
    assert "out of pages" in failed.error.message
    assert failed.output_text == "Hel"
    assert client.responses.retrieve(failed.id).status == "failed"
    with pytest.raises(openai.InternalServerError, match="out of pages"):
        client.responses.create(input="Hi")
    late = ended(client, client.responses.create(input="Hi", background=True))
    assert late.status == "failed"


def test_an_abort_by_its_id(server, client, engine, until):
    engine.hold = True
    answer = client.responses.create(input="Hi", background=True)
    until(lambda: len(engine.open) == 1)
    httpx.post(f"{server.url}/abort_request", json={"rid": answer.id}).raise_for_status()
    assert ended(client, answer).status == "cancelled"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"input": []}, "input"),
        ({"input": [{"role": "robot", "content": "x"}]}, "input[0].role"),
        ({"input": [{"type": "computer_call", "id": "x"}]}, "input[0]"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
        (
            {"input": [{"type": "reasoning", "summary": [], "encrypted_content": "gAAA"}]},
            "input[0].encrypted_content",
        ),
        ({"top_p": 0.0}, "top_p"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"truncation": "never"}, "truncation"),
        ({"tools": [{"type": "web_search"}]}, "tools[0]"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"include": ["the.moon"]}, "include"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"reasoning": {"summary": "detailed"}}, "reasoning.summary"),
        ({"text": {"verbosity": "low"}}, "text.verbosity"),
        ({"extra_body": {"temperatur": 1}}, "temperatur"),
        ({"stream": True, "stream_options": {"colour": True}}, "stream_options.colour"),
        ({"metadata": {str(i): "x" for i in range(17)}}, "metadata"),
        ({"input": "x" * 2000}, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_honoured_is_a_400_that_names_it(client, engine, options, param, stream):
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"input": "Hi", "stream": stream, **options})
    if param is not None:
        assert param in str(refused.value.param)
    assert engine.submitted == []


def test_errors_are_nested_as_openai_does_it(server):
    answer = httpx.post(f"{server.url}/v1/responses", json={"input": "Hi", "model": "gpt-4"})
    assert answer.status_code == 404
    assert answer.json()["error"]["param"] == "model"
    assert httpx.get(f"{server.url}/v1/responses/resp_none").json()["error"]["code"] == 404


def test_a_server_that_keeps_nothing(live):
    with openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0) as client:
        answer = client.responses.create(input="Hi")
        assert answer.output_text == TEXT
        assert answer.model_extra["store"] is False
        with pytest.raises(openai.NotFoundError, match="--responses-store"):
            client.responses.retrieve(answer.id)
        for options in ({"store": True}, {"background": True}, {"previous_response_id": "r"}):
            with pytest.raises(openai.BadRequestError, match="--responses-store"):
                client.responses.create(input="Hi", **options)
