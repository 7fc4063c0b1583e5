"""Log probabilities of /generate, in SGLang's format."""

from __future__ import annotations

import pytest

from tests.frontends.scored import logprob_of

GREEDY = {"temperature": 0, "max_new_tokens": 3}
REPLY = "Hel"


@pytest.fixture
def ids(tokenizer):
    return lambda text: tokenizer.encode(text)


def entries(token_ids, texts=None):
    return [
        [pytest.approx(logprob_of(one)), one, texts[i] if texts else None]
        for i, one in enumerate(token_ids)
    ]


def ask(api, text="Hi!", **fields):
    response = api.post("/generate", {"text": text, "sampling_params": GREEDY, **fields})
    assert response.status_code == 200, response.text
    return response.json()


def test_there_are_none_unless_they_are_asked_for(api):
    assert not any("logprob" in name for name in ask(api)["meta_info"])


def test_of_the_output(api, ids):
    meta = ask(api, return_logprob=True)["meta_info"]
    assert meta["output_token_logprobs"] == entries(ids(REPLY))
    assert meta["input_token_logprobs"] == []
    assert not any("top" in name or "token_ids" in name for name in meta)


@pytest.mark.parametrize("start", [0, 1, 2])
def test_of_the_prompt_the_first_has_none(api, ids, start):
    meta = ask(api, return_logprob=True, logprob_start_len=start, return_text_in_logprobs=True)[
        "meta_info"
    ]
    text = "Hi!"[start:]
    first, *others = entries(ids(text), text)
    assert meta["input_token_logprobs"] == [[None, *first[1:]], *others]
    assert meta["output_token_logprobs"] == entries(ids(REPLY), REPLY)


def test_of_the_likeliest_and_of_chosen_tokens(api):
    meta = ask(
        api,
        return_logprob=True,
        logprob_start_len=0,
        top_logprobs_num=2,
        token_ids_logprob=[70, 7],
    )["meta_info"]
    assert meta["input_top_logprobs"] == [None, *[entries([0, 1])] * 2]
    assert meta["output_top_logprobs"] == [entries([0, 1])] * 3
    assert meta["input_token_ids_logprobs"] == [None, *[entries([70, 7])] * 2]
    assert meta["output_token_ids_logprobs"] == [entries([70, 7])] * 3


def test_in_a_batch_each_prompt_has_its_own(api, ids):
    answers = ask(
        api,
        ["ab", "cd"],
        return_logprob=[True, True],
        logprob_start_len=[-1, 0],
        top_logprobs_num=[1, 0],
        token_ids_logprob=[[], [5]],
    )
    first, second = (answer["meta_info"] for answer in answers)
    assert first["input_token_logprobs"] == []
    assert first["output_top_logprobs"] == [entries([0])] * 3
    assert "output_token_ids_logprobs" not in first
    assert len(second["input_token_logprobs"]) == 2
    assert second["output_token_ids_logprobs"] == [entries([5])] * 3
    mixed = ask(api, ["ab", "cd"], return_logprob=[False, True])
    assert ["output_token_logprobs" in one["meta_info"] for one in mixed] == [False, True]


def test_every_sample_has_them(api, ids):
    answers = ask(
        api,
        return_logprob=True,
        logprob_start_len=0,
        sampling_params={**GREEDY, "n": 2, "temperature": 1},
    )
    for answer in answers:
        assert len(answer["meta_info"]["input_token_logprobs"]) == 3
        assert answer["meta_info"]["output_token_logprobs"] == entries(ids(REPLY))


def test_a_stream_adds_them_up(api, events, ids):
    body = {
        "text": "Hi!",
        "sampling_params": GREEDY,
        "stream": True,
        "return_logprob": True,
        "logprob_start_len": 0,
    }
    got = events(api.post("/generate", body).text)
    lengths = [len(event["meta_info"]["output_token_logprobs"]) for event in got]
    assert lengths == [1, 2, 3]
    assert all(len(event["meta_info"]["input_token_logprobs"]) == 3 for event in got)
    assert got[-1]["meta_info"]["output_token_logprobs"] == entries(ids(REPLY))


def test_a_stream_interval_joins_events(api, events):
    sampling = {**GREEDY, "max_new_tokens": 7, "stream_interval": 3}
    body = {"text": "Hi!", "sampling_params": sampling, "stream": True, "return_logprob": True}
    got = events(api.post("/generate", body).text)
    assert [len(event["output_ids"]) for event in got] == [3, 6, 7]
    assert [len(event["meta_info"]["output_token_logprobs"]) for event in got] == [3, 6, 7]


def test_the_servers_stream_interval_holds_back_all_but_the_first_token(
    api_with, engine, tokenizer, events
):
    from sapwood.text.generation import TextGenerator

    api = api_with(generator=TextGenerator(engine, tokenizer, stream_interval=3))
    body = {"text": "Hi!", "sampling_params": {**GREEDY, "max_new_tokens": 8}, "stream": True}
    got = events(api.post("/generate", body).text)
    assert [len(event["output_ids"]) for event in got] == [1, 4, 7, 8]


def test_what_is_wrong_with_the_model_at_hand_is_named_by_its_path(api):
    sampling = {"logit_bias": {"9999": 1}}
    for stream in (False, True):
        body = {"text": "a", "sampling_params": sampling, "stream": stream}
        response = api.post("/generate", body)
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == "sampling_params.logit_bias"
        assert error["message"].startswith("sampling_params.logit_bias has the token id 9999")


def test_a_custom_processor_and_its_parameters_reach_the_engine(api_with, engine, tokenizer):
    from sapwood.text.generation import TextGenerator

    api = api_with(generator=TextGenerator(engine, tokenizer, logits_processors={"mine"}))
    sampling = {"custom_params": {"a": [1, None]}, "stop_regex": "o+"}
    ask(api, custom_logit_processor="mine", sampling_params=sampling)
    got = engine.submitted[-1].options.sampling
    assert (got.custom_logit_processor, got.custom_params) == ("mine", {"a": [1, None]})
    assert got.stop_regex == ("o+",)
