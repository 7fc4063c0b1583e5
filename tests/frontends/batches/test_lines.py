import json

import orjson
import pytest

from sapwood.base.errors import InvalidRequest, SapwoodError, UnsupportedFeature
from sapwood.frontends.batches.lines import (
    is_failure,
    key_of_answer,
    read_line,
    refusal,
    reply,
    to_post,
)

CHAT = {
    "custom_id": "c",
    "method": "POST",
    "url": "/v1/chat/completions",
    "body": {"messages": [{"role": "user", "content": "Hi"}]},
}


def line(content, number=1):
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return read_line(raw, number)


@pytest.mark.parametrize(
    ("content", "key", "is_openai"),
    [
        ({"id": "a", "prompt": "x"}, "a", False),
        ({"id": 7, "prompt": "x"}, "7", False),
        ({"prompt": "x"}, "line-5", False),
        ({"id": None, "prompt": "x"}, "line-5", False),
        ({"id": ["a"], "prompt": "x"}, "line-5", False),
        (CHAT, "c", True),
        ({"url": "/v1/completions"}, "line-5", True),
        (b"{", "line-5", False),
        (b"[]", "line-5", False),
        (b"\xff", "line-5", False),
    ],
)
def test_a_line_is_known_by_its_id_or_its_number(content, key, is_openai):
    read = line(content, 5)
    assert (read.key, read.is_openai, read.number) == (key, is_openai, 5)


@pytest.fixture
def services(make_services):
    return make_services()[0]


def test_a_prompt_is_a_request_to_generate(services):
    asked = {"id": "a", "prompt": "x", "sampling_params": {"temperature": 0}}
    assert to_post(line(asked), services) == (
        "/generate",
        {"text": "x", "sampling_params": {"temperature": 0}},
    )
    assert to_post(line({"prompt": [1, 2]}), services) == (
        "/generate",
        {"input_ids": [1, 2], "sampling_params": {}},
    )


def test_messages_go_through_the_template_once(services):
    path, body = to_post(line({"messages": [{"role": "user", "content": "Hi"}]}), services)
    assert path == "/generate"
    text = services.tokenizer.decode(body["input_ids"], skip_special_tokens=False)
    assert "<|im_start|>user\nHi<|im_end|>" in text
    assert text.endswith("<|im_start|>assistant\n")


def test_an_openai_line_is_its_body(services):
    assert to_post(line(CHAT), services) == ("/v1/chat/completions", CHAT["body"])


@pytest.mark.parametrize(
    ("content", "error", "words"),
    [
        (b"not json", InvalidRequest, "the line is not JSON"),
        (b"[1]", InvalidRequest, "the line is a JSON list"),
        ({"id": "a"}, InvalidRequest, "exactly one of prompt and messages"),
        ({"prompt": "a", "messages": []}, InvalidRequest, "exactly one of"),
        ({"prompt": 3}, InvalidRequest, "prompt"),
        ({"prompt": "a", "promt": "b"}, InvalidRequest, "promt"),
        ({"messages": []}, InvalidRequest, "message"),
        ({**CHAT, "custom_id": None}, InvalidRequest, "custom_id is required"),
        ({**CHAT, "method": "GET"}, InvalidRequest, "method is 'GET'"),
        ({**CHAT, "url": "/v1/edits"}, UnsupportedFeature, "url is '/v1/edits'"),
        ({**CHAT, "body": []}, InvalidRequest, "body"),
        ({**CHAT, "body": {"stream": True}}, InvalidRequest, "stream"),
        ({**CHAT, "body": {"background": True}}, InvalidRequest, "background"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(services, content, error, words):
    with pytest.raises(error) as refused:
        to_post(line(content), services)
    assert words in refused.value.message


def test_messages_need_a_template(make_services):
    services, _ = make_services(has_template=False)
    with pytest.raises(UnsupportedFeature, match="--chat-template"):
        to_post(line({"messages": [{"role": "user", "content": "Hi"}]}), services)


def test_the_answer_of_a_native_line():
    asked = line({"id": 7, "prompt": "x"})
    body = {"text": "y", "meta_info": {"completion_tokens": 3}}
    answered = reply(asked, 200, orjson.dumps(body))
    assert answered.answer == {"id": 7, **body, "error": None}
    assert (answered.num_output_tokens, answered.has_failed) == (3, False)


def test_several_samples_of_a_native_line():
    body = [{"text": "y", "meta_info": {"completion_tokens": 3}}] * 2
    answered = reply(line({"id": 7, "prompt": "x"}), 200, orjson.dumps(body))
    assert answered.answer == {"id": 7, "samples": body, "error": None}
    assert answered.num_output_tokens == 6


def test_a_native_refusal():
    answered = reply(line({"prompt": "x"}, 4), 400, b'{"error": {"message": "no"}}')
    assert answered.answer == {"id": "line-4", "error": {"message": "no"}}
    assert (answered.num_output_tokens, answered.has_failed) == (0, True)


@pytest.mark.parametrize("status", [200, 400])
def test_the_answer_of_an_openai_line(status):
    body = {"usage": {"completion_tokens": 3}}
    answered = reply(line(CHAT), status, orjson.dumps(body))
    response = answered.answer["response"]
    assert answered.answer["id"].startswith("batch_req_")
    assert answered.answer["custom_id"] == "c"
    assert answered.answer["error"] is None
    assert (response["status_code"], response["body"]) == (status, body)
    assert len(response["request_id"]) == 32
    assert answered.has_failed is (status != 200)
    assert answered.num_output_tokens == (3 if status == 200 else 0)


@pytest.mark.parametrize("content", [CHAT, {"id": "c", "prompt": "x"}])
def test_a_refused_line_has_the_line_s_format_and_its_number(content):
    asked = line(content, 9)
    answered = refusal(asked, SapwoodError("no room"))
    assert answered.has_failed
    assert answered.answer["error"]["message"] == "line 9: no room"
    assert key_of_answer(answered.answer) == asked.key
    assert is_failure(answered.answer)
    assert ("custom_id" in answered.answer) is asked.is_openai


def test_an_answer_is_a_failure_by_its_error_or_its_status():
    assert not is_failure({"id": "a", "text": "x", "error": None})
    assert not is_failure({"id": "a", "response": {"status_code": 200}, "error": None})
    assert is_failure({"id": "a", "response": {"status_code": 400}, "error": None})
    assert is_failure({"id": "a", "error": {"message": "no"}})


@pytest.mark.parametrize(
    ("answer", "key"),
    [
        ({"id": "batch_req_1", "custom_id": "c"}, "c"),
        ({"id": 7}, "7"),
        ({"text": "x"}, None),
        ({"id": [1]}, None),
    ],
)
def test_the_key_of_an_answer(answer, key):
    assert key_of_answer(answer) == key
