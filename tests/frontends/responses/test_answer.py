"""Items and events from a chat's deltas, text, reasoning and calls among them."""

import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from sapwood.base.errors import SapwoodError
from sapwood.frontends.responses.answer import Answer
from sapwood.frontends.responses.protocol import ResponsesRequest
from sapwood.frontends.responses.request import head

EVENT = TypeAdapter(ResponseStreamEvent)


def chunk(finish=None, logprobs=None, **delta):
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return {"choices": [choice | ({"logprobs": {"content": logprobs}} if logprobs else {})]}


def call(index, arguments, **first):
    function = {"arguments": arguments} | ({"name": first["name"]} if first else {})
    head = {"id": first["id"], "type": "function"} if first else {}
    return {"index": index, "function": function, **head}


@pytest.fixture
def answer(services):
    asked = ResponsesRequest(input="Hi")
    return Answer(head(asked, services, "resp_1", is_stored=True), with_logprobs=True)


def told(answer, *chunks):
    """All events, each of the form that the official client expects."""
    events = answer.begin()
    for one in chunks:
        events += answer.add(one)
    events += answer.finish()
    for event in events:
        EVENT.validate_python(event)
    Response.model_validate(answer.record)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def test_reasoning_text_and_calls_are_items_one_after_the_other(answer):
    events = told(
        answer,
        chunk(role="assistant", content=""),
        chunk(reasoning_content="Hm"),
        chunk(reasoning_content=", yes."),
        chunk(content="I "),
        chunk(content="call."),
        chunk(tool_calls=[call(0, "", id="c1", name="f")]),
        chunk(tool_calls=[call(0, '{"a":')]),
        chunk(tool_calls=[call(0, "1}"), call(1, "{}", id="c2", name="g")]),
        chunk(finish="tool_calls"),
    )
    output = answer.record["output"]
    assert [item["type"] for item in output] == [
        "reasoning",
        "message",
        "function_call",
        "function_call",
    ]
    assert output[0]["content"] == [{"type": "reasoning_text", "text": "Hm, yes."}]
    assert output[1]["content"][0]["text"] == "I call."
    assert [(item["name"], item["call_id"], item["arguments"]) for item in output[2:]] == [
        ("f", "c1", '{"a":1}'),
        ("g", "c2", "{}"),
    ]
    assert {item["status"] for item in output} == {"completed"}
    assert answer.record["status"] == "completed"
    for index in range(4):
        kinds = [e["type"] for e in events if e.get("output_index") == index]
        assert kinds[0] == "response.output_item.added"
        assert kinds[-1] == "response.output_item.done"
    arguments = [e for e in events if e["type"] == "response.function_call_arguments.done"]
    assert [e["arguments"] for e in arguments] == ['{"a":1}', "{}"]


def test_log_probabilities_are_in_deltas_and_in_the_whole(answer):
    entry = {"token": "a", "bytes": [97], "logprob": -0.5}
    entry["top_logprobs"] = [{"token": "b", "bytes": [98], "logprob": -1.0}]
    events = told(
        answer,
        chunk(content="", logprobs=[entry]),
        chunk(content="ä", logprobs=[entry], finish="stop"),
    )
    deltas = [e for e in events if e["type"] == "response.output_text.delta"]
    assert [len(e["logprobs"]) for e in deltas] == [1, 1]
    assert deltas[0]["logprobs"][0]["top_logprobs"] == [{"token": "b", "logprob": -1.0}]
    assert answer.record["output"][0]["content"][0]["logprobs"] == [entry, entry]


def test_no_output_at_all(answer):
    events = told(answer, chunk(finish="stop"))
    assert [e["type"] for e in events] == [
        "response.created",
        "response.in_progress",
        "response.completed",
    ]


@pytest.mark.parametrize(
    ("reason", "status", "kind"),
    [
        ("stop", "completed", "response.completed"),
        ("length", "incomplete", "response.incomplete"),
        ("abort", "cancelled", "response.incomplete"),
    ],
)
def test_the_last_event_says_how_it_ended(answer, reason, status, kind):
    events = told(answer, chunk(content="a"), chunk(finish=reason))
    assert (answer.record["status"], events[-1]["type"]) == (status, kind)
    assert answer.record["output"][0]["status"] == (
        "completed" if status == "completed" else "incomplete"
    )


def test_after_the_end_nothing_changes(answer):
    told(answer, chunk(finish="stop"))
    assert answer.cancel() == []
    assert answer.fail(SapwoodError("late")) == []
    assert answer.record["status"] == "completed"


def test_earlier_events_keep_the_state_that_they_told(answer):
    events = told(answer, chunk(content="a"), chunk(finish="stop"))
    assert events[0]["response"]["output"] == []
    assert events[2]["item"]["content"] == []
    assert events[3]["part"]["text"] == ""
