import pytest

from sapwood.schema.output import AdapterUse

FIGURES = {"num_pages": 100, "num_leased_pages": 25, "num_free_pages": 60, "num_waiting": 2}


def test_a_load_has_its_sections_and_an_aggregate(api, engine):
    engine.figures = FIGURES | {"num_running": 3}
    answer = api.get("/v1/loads").json()
    assert set(answer) == {"timestamp", "version", "dp_rank_count", "loads", "aggregate"}
    [load] = answer["loads"]
    assert (load["num_running_reqs"], load["num_waiting_reqs"]) == (3, 2)
    assert load["num_used_tokens"] == 25 * 16
    assert load["token_usage"] == 0.25
    assert load["max_total_num_tokens"] == 4096
    assert load["queues"] == {"waiting": 2, "retracted": 0}
    assert load["speculative"] is None
    assert answer["aggregate"] == {
        "total_running_reqs": 3,
        "total_waiting_reqs": 2,
        "total_reqs": 5,
        "avg_token_usage": 0.25,
        "avg_throughput": 0.0,
        "avg_utilization": 0.375,
    }


def test_only_the_sections_that_are_asked_for(api):
    [load] = api.get("/v1/loads?include=queues,memory").json()["loads"]
    assert set(load) == {"dp_rank", "queues", "memory"}
    [load] = api.get("/v1/loads?include=lora&dp_rank=0").json()["loads"]
    assert load == {"dp_rank": 0, "lora": None}


def test_the_section_of_adapters(api, engine):
    engine.figures = {
        "adapters": AdapterUse(
            num_used=3, num_slots=8, bytes_used=10, max_bytes=40, num_loaded=5, num_evictions=2
        )
    }
    [load] = api.get("/v1/loads?include=lora&dp_rank=0").json()["loads"]
    assert load["lora"] == {"slots_used": 3, "slots_total": 8, "utilization": 0.25}


def test_the_same_for_prometheus(api, engine):
    engine.figures = FIGURES
    response = api.get("/v1/loads?format=prometheus&include=core")
    assert response.headers["content-type"].startswith("text/plain")
    assert 'sapwood:load_num_waiting_reqs{dp_rank="0"} 2.0\n' in response.text


@pytest.mark.parametrize(
    ("query", "param"),
    [("include=cores", "include"), ("format=xml", "format"), ("dp_rank=1", "dp_rank")],
)
def test_unknown_values_are_named(api, query, param):
    response = api.get(f"/v1/loads?{query}")
    assert response.status_code == 400
    assert response.json()["param"] == param


def test_the_old_form_is_a_list(api, engine):
    engine.figures = FIGURES
    [load] = api.get("/get_load").json()
    assert load.pop("ts_tic") > 0
    assert load == {"dp_rank": 0, "num_reqs": 2, "num_waiting_reqs": 2, "num_tokens": 400}


def test_an_engine_that_has_never_answered_is_unavailable(api, engine):
    engine.unavailable_reason = "starting"
    engine.status = unavailable
    assert api.get("/v1/loads").status_code == 503
    assert api.get("/get_load").status_code == 503


async def unavailable():
    from sapwood.base.errors import EngineUnavailable

    raise EngineUnavailable("the engine is starting")
