"""SageMaker's and Vertex's routes."""

import pytest


def test_ping_is_a_health_check(api, engine):
    assert api.get("/ping").status_code == 200
    engine.unavailable_reason = "the engine is starting"
    assert api.get("/ping").status_code == 503


def test_invocations_are_chats(api):
    body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 5}
    answer = api.post("/invocations", body).json()
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["content"] == "Hello"
    streamed = api.post("/invocations", {**body, "stream": True})
    assert streamed.text.endswith("data: [DONE]\n\n")
    refused = api.post("/invocations", {})
    assert (refused.status_code, refused.json()["param"]) == (400, "messages")


def test_vertex_instances_are_prompts_of_one_batch(api, engine):
    parameters = {"sampling_params": {"max_new_tokens": 5}}
    body = {"instances": [{"text": "a"}, {"text": "b"}], "parameters": parameters}
    answer = api.post("/vertex_generate", body).json()
    assert [one["text"] for one in answer["predictions"]] == ["Hello", "Hello"]
    ids = {"instances": [{"input_ids": [1, 2]}]}
    assert api.post("/vertex_generate", ids).json()["predictions"][0]["text"] == "Hello, wörld!"
    assert engine.submitted[-1].prompt_ids == [1, 2]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "instances"),
        ({"instances": []}, "instances"),
        ({"instances": [{"text": "a"}, {"input_ids": [1]}]}, "instances"),
        ({"instances": [{"text": "a"}, {}]}, "instances"),
        ({"instances": [{"text": "a", "colour": 1}]}, "instances"),
        ({"instances": [{"text": "a"}], "parameters": {"stream": True}}, "parameters.stream"),
        ({"instances": [{"text": "a"}], "parameters": {"txt": 1}}, "parameters.txt"),
    ],
)
def test_what_vertex_cannot_have_is_refused(api, body, param):
    answer = api.post("/vertex_generate", body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
