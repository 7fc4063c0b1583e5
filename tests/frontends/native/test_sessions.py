"""/open_session, /close_session and session_params, as SGLang's clients use them."""

from __future__ import annotations

from typing import Any

import pytest


def generate(api: Any, session: str, prompt: str, **params: Any) -> Any:
    body = {"text": prompt, "session_params": {"id": session, **params}}
    return api.post("/generate", {**body, "sampling_params": {"max_new_tokens": 3}})


def test_a_conversation(api: Any, engine: Any) -> None:
    session = api.post("/open_session", {"capacity_of_str_len": 1000}).json()
    assert isinstance(session, str)
    again = api.post("/open_session", {"capacity_of_str_len": 1000, "session_id": session})
    assert again.status_code == 400
    first = generate(api, session, "ab", rid=None, offset=-1, replace=True).json()
    rid = first["meta_info"]["id"]
    second = generate(api, session, "cd", rid=rid, offset=-1, replace=None).json()
    assert second["meta_info"]["prompt_tokens"] == 2 + 3 - 1 + 2
    # Another branch; the first one stays.
    third = generate(api, session, "e", rid=rid, drop_previous_output=True).json()
    assert third["meta_info"]["prompt_tokens"] == 3
    replaced = generate(api, session, "f", rid=rid, replace=True).json()
    assert replaced["meta_info"]["prompt_tokens"] == 2 + 3 + 1
    gone = generate(api, session, "g", rid=second["meta_info"]["id"])
    assert gone.status_code == 400
    assert "no request" in gone.json()["error"]["message"]
    assert api.post("/close_session", {"session_id": session}).status_code == 200
    assert generate(api, session, "h", rid=rid).status_code == 400
    assert api.post("/close_session", {"session_id": session}).status_code == 200


def test_a_stream_is_a_turn_as_well(api: Any) -> None:
    session = api.post("/open_session", None).json()
    body = {"text": "ab", "rid": "one", "session_params": {"id": session}, "stream": True}
    answer = api.post("/generate", {**body, "sampling_params": {"max_new_tokens": 3}})
    assert answer.status_code == 200
    assert answer.text.endswith("data: [DONE]\n\n")
    later = generate(api, session, "c", rid="one").json()
    assert later["meta_info"]["prompt_tokens"] == 2 + 3 + 1


def test_prompts_of_a_batch_are_branches(api: Any) -> None:
    session = api.post("/open_session", None).json()
    generate(api, session, "ab", rid=None)
    body = {"text": ["c", "de"], "rid": ["x", "y"], "sampling_params": {"max_new_tokens": 2}}
    none, both = {"id": None}, {"id": session}
    answers = api.post("/generate", {**body, "session_params": [none, both]}).json()
    assert [one["meta_info"]["prompt_tokens"] for one in answers] == [1, 2]
    after = {**body, "session_params": {"id": session, "rid": "y"}, "rid": ["p", "q"]}
    answers = api.post("/generate", after).json()
    assert [one["meta_info"]["prompt_tokens"] for one in answers] == [2 + 2 + 1, 2 + 2 + 2]


@pytest.mark.parametrize(
    "params",
    [
        {"id": "nowhere"}, {"id": 3}, {"id": "x" * 10**5}, {"rid": "a", "id": ""},
        {"id": "nowhere", "offset": 2**70}, {"id": "s", "no_such": 1}, [], "s", [{"id": "s"}] * 2,
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(api: Any, params: Any) -> None:
    """With 400; and nothing of it stays behind."""
    api.post("/open_session", {"session_id": "s"})
    answer = api.post("/generate", {"text": "ab", "session_params": params})
    if params == []:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    assert api.post("/generate", {"text": "ab"}).status_code == 200


def test_one_sample_and_a_prompt_of_tokens(api: Any) -> None:
    session = api.post("/open_session", None).json()
    body = {"text": "ab", "session_params": {"id": session}}
    assert api.post("/generate", {**body, "sampling_params": {"n": 2}}).status_code == 400
