from __future__ import annotations

import threading

import httpx
import pytest


def test_health_tells_why_not(api, engine):
    assert api.get("/health").status_code == 200
    engine.unavailable_reason = "died: out of memory"
    response = api.get("/health")
    assert response.status_code == 503
    assert "died: out of memory" in response.json()["error"]["message"]
    assert api.get("/health_generate").status_code == 503


def test_health_generate_makes_one_token_and_leaves_nothing(api, engine):
    assert api.get("/health_generate").status_code == 200
    assert engine.submitted[0].options.sampling.max_new_tokens == 1
    assert engine.open == {}


@pytest.mark.parametrize("path", ["/model_info", "/get_model_info"])
def test_model_info(api_with, path):
    api = api_with(model_type="llama", architectures=("LlamaForCausalLM",))
    assert api.get(path).json() == {
        "model_path": "/models/tiny",
        "tokenizer_path": "/models/tiny",
        "is_generation": True,
        "preferred_sampling_params": None,
        "weight_version": "default",
        "has_image_understanding": False,
        "has_audio_understanding": False,
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
    }


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
def test_server_info_has_configuration_counters_and_reasons(api, path):
    body = api.get(path).json()
    assert body["max_running_requests"] == 8
    assert body["version"] == "0.1.0"
    assert body["status"] == "ready"
    assert body["max_total_num_tokens"] == 4096
    assert body["tokenizer_path"] == "/models/tiny"
    assert body["internal_states"][0]["num_running"] == 0
    assert body["notes"] == ["page_size 16: asked"]


def test_server_info_has_what_sglangs_tools_read(api, engine):
    engine.figures = {"num_free_pages": 200, "num_leased_pages": 40}
    [state] = api.get("/server_info").json()["internal_states"]
    assert state["effective_max_running_requests_per_dp"] == engine.info.max_running_requests
    assert state["memory_usage"] == {
        "weight": 0.25,
        "kvcache": 0.26,
        "graph": 0.0,
        "token_capacity": 4096,
        "pools": {"full": {"size": 256, "num_free": 200, "num_leased": 40, "gb": 0.256}},
    }
    assert state["last_gen_throughput"] == 0.0


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_flush_cache_says_if_it_could_not(api, engine, method):
    assert api.request(method, "/flush_cache").status_code == 200
    engine.flushes = False
    response = api.request(method, "/flush_cache")
    assert response.status_code == 400
    assert "try again when idle" in response.json()["error"]["message"]


@pytest.mark.parametrize("body", [{}, {"rid": ""}, {"rid": 5}, {"rdi": "x"}])
def test_abort_needs_to_know_what(api, body):
    assert api.post("/abort_request", body).status_code == 400


@pytest.mark.parametrize(
    ("body", "ended"),
    [({"rid": "job-1"}, {"job-1", "job-12"}), ({"abort_all": True}, {"job-1", "job-12", "job-2"})],
)
def test_abort_ends_open_requests_by_prefix_with_an_answer(live, engine, until, body, ended):
    engine.hold = True
    answers: dict[str, dict] = {}

    def ask(rid: str) -> None:
        asked = {"text": "a", "rid": rid}
        answers[rid] = httpx.post(f"{live.url}/generate", json=asked, timeout=20).json()

    threads = [threading.Thread(target=ask, args=(rid,)) for rid in ("job-1", "job-12", "job-2")]
    for thread in threads:
        thread.start()
    until(lambda: len(engine.open) == 3)
    response = httpx.post(f"{live.url}/abort_request", json=body)
    assert set(response.json()["aborted"]) == ended
    until(lambda: set(answers) >= ended)
    engine.hold = False
    for thread in threads:
        thread.join()
    kinds = {rid: a["meta_info"]["finish_reason"]["type"] for rid, a in answers.items()}
    assert kinds == {rid: "abort" if rid in ended else "stop" for rid in answers}


def test_an_id_is_open_once(live, engine, until):
    engine.hold = True
    first = threading.Thread(
        target=lambda: httpx.post(f"{live.url}/generate", json={"text": "a", "rid": "same"})
    )
    first.start()
    until(lambda: "same" in engine.open)
    response = httpx.post(f"{live.url}/generate", json={"text": "a", "rid": "same"})
    engine.hold = False
    first.join()
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "rid"
    assert httpx.post(f"{live.url}/generate", json={"text": "a", "rid": "same"}).status_code == 200
