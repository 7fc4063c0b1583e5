import json
from pathlib import Path

import pytest

from sapwood.observe.profiling import default_folder


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_profile_begins_with_the_defaults(api, engine, method):
    assert api.request(method, "/start_profile").json() == {"success": True, "message": "recording"}
    [order] = engine.calls
    assert order.folder == str(default_folder())
    assert order.activities == ("CPU", "GPU")
    assert (order.num_steps, order.by_stage) == (None, False)
    assert api.request(method, "/stop_profile").status_code == 200
    assert engine.calls[1:] == ["stop_profile"]


def test_a_profiles_fields_arrive(api, engine):
    body = {
        "output_dir": "/profiles",
        "start_step": 10,
        "num_steps": 5,
        "activities": ["CPU"],
        "profile_by_stage": True,
        "with_stack": True,
        "record_shapes": True,
        "profile_prefix": "night",
        "profile_id": "7",
    }
    assert api.post("/start_profile", body).status_code == 200
    [order] = engine.calls
    assert (order.folder, order.name) == ("/profiles", "night-7-rank0")
    assert (order.start_step, order.num_steps, order.activities) == (10, 5, ("CPU",))
    assert order.by_stage
    assert order.with_stack
    assert order.record_shapes


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"activities": ["RPD"]}, "activities"),
        ({"num_steps": 0}, "num_steps"),
        ({"profile_by_stage": True}, "num_steps"),
        ({"start_step": -1}, "start_step"),
        ({"profile_prefix": "../../etc/x"}, "profile_prefix"),
        ({"merge_profiles": True}, "merge_profiles"),
        ({"unknown": 1}, "unknown"),
    ],
)
def test_impossible_profiles_never_reach_the_engine(api, engine, body, param):
    response = api.post("/start_profile", body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert engine.calls == []


def test_what_the_engine_refuses_is_a_400(api, engine):
    engine.refuses = True
    response = api.post("/stop_profile")
    assert response.status_code == 400
    assert "no profile" in response.json()["error"]["message"]


@pytest.mark.parametrize("path", ["/start_profile", "/stop_profile", "/freeze_gc"])
def test_web_pages_of_others_cannot_steer(api, engine, path):
    response = api.get(path, headers={"sec-fetch-site": "cross-site"})
    assert response.status_code == 403
    assert engine.calls == []


def test_experts_are_recorded(api, engine):
    for action in ("start", "stop", "dump"):
        answer = api.post(f"/{action}_expert_distribution_record")
        assert answer.json() == {"success": True, "message": "recording experts"}
    assert engine.calls == ["start", "stop", "dump"]


def test_the_engine_can_be_slowed_down_and_let_go_again(api, engine):
    for asked in (0.5, 0, None):
        answer = api.post("/slow_down", {"forward_sleep_time": asked})
        assert answer.json() == {"success": True, "message": "slower"}
    assert engine.calls == [("slow_down", 0.5), ("slow_down", 0.0), ("slow_down", 0.0)]


@pytest.mark.parametrize("asked", [-1, 61, "long"])
def test_a_rest_that_cannot_be_meant_is_refused(api, engine, asked):
    answer = api.post("/slow_down", {"forward_sleep_time": asked})
    assert (answer.status_code, engine.calls) == (400, [])
    assert "forward_sleep_time" in answer.text


def test_garbage_collection_is_frozen_in_both_processes(api, engine, monkeypatch):
    frozen = []
    monkeypatch.setattr("gc.freeze", lambda: frozen.append(True))
    assert api.post("/freeze_gc").json()["message"] == "7 objects"
    assert (engine.calls, frozen) == (["freeze_gc"], [True])


def test_the_log_is_turned_on_while_the_server_runs(api, services, capsys):
    from sapwood.observe.request_log import open_sinks

    services.observer.log._sinks = open_sinks(("stdout",), "requests")
    api.post("/generate", {"text": "before"})
    body = {"log_requests": True, "log_requests_level": 3, "log_requests_format": "json"}
    answer = api.post("/configure_logging", body).json()
    assert answer["log_requests_level"] == 3
    api.post("/generate", {"text": "after", "rid": "mine"})
    api.post("/configure_logging", {"log_requests": False})
    api.post("/generate", {"text": "later"})
    received, finished = map(json.loads, capsys.readouterr().out.splitlines())
    assert received["rid"] == "mine"
    assert received["obj"]["path"] == "/generate"
    assert finished["out"]["text"] == ["Hello, wörld!"]


def test_requests_are_dumped_and_the_dump_ends(api, services, tmp_path, until):
    folder = str(tmp_path / "dumps")
    body = {"dump_requests_folder": folder, "dump_requests_threshold": 2}
    assert api.post("/configure_logging", body).json()["dump_requests_threshold"] == 2
    for text in ("one", "two", "three"):
        api.post("/generate", {"text": text})
    ended = api.post("/configure_logging", {"dump_requests_folder": ""}).json()
    assert ended["dump_requests_folder"] == ""
    api.post("/generate", {"text": "four"})
    until(lambda: prompts(tmp_path / "dumps") == ["one", "two", "three"])
    assert services.observer.dump is None


def prompts(folder: Path) -> list[str]:
    paths = sorted(folder.glob("*.jsonl"), key=lambda path: path.stem.rsplit("-", 1)[1])
    lines = [line for path in paths for line in path.read_text().splitlines()]
    return [json.loads(line)["prompt"] for line in lines]


def test_the_crash_dumps_folder_can_be_set(api, services, tmp_path):
    api.post("/configure_logging", {"crash_dump_folder": str(tmp_path)})
    api.post("/generate", {"text": "kept"})
    path = services.observer.write_crash_dump("it broke")
    assert json.loads(path.read_text())["requests"][0]["prompt"] == "kept"
    api.post("/configure_logging", {"crash_dump_folder": ""})
    assert services.observer.write_crash_dump("it broke") is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"log_requests_level": 4}, "log_requests_level"),
        ({"log_requests_format": "xml"}, "log_requests_format"),
        ({"dump_requests_threshold": 0}, "dump_requests_threshold"),
        ({"dump_requests_threshold": 5}, "dump_requests_folder"),
    ],
)
def test_impossible_settings_are_named_and_change_nothing(api, services, body, param):
    response = api.post("/configure_logging", {**body, "log_requests": True})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert not services.observer.log.enabled
