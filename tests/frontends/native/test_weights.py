"""The routes about weights, pauses and memory, as SGLang's clients call them."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from sapwood.schema.request import OrderWeights
from sapwood.schema.weights import (
    CheckWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    ReadWeight,
    ReleaseMemory,
    ResumeMemory,
    UpdateFromDisk,
    UpdateFromGroup,
    UpdateFromTensors,
    WeightOrder,
)


@pytest.mark.parametrize(
    ("path", "body", "order"),
    [
        ("update_weights_from_disk", {"model_path": "/b"}, UpdateFromDisk(path="/b")),
        (
            "update_weights_from_disk",
            {"model_path": "/b", "load_format": "gguf", "is_async": False, "token_step": 3},
            UpdateFromDisk(path="/b", load_format="gguf"),
        ),
        (
            "update_weights_from_tensor",
            {"serialized_named_tensors": [base64.b64encode(b"abc").decode()]},
            UpdateFromTensors(parts=[b"abc"], form="pickle"),
        ),
        (
            "update_weights_from_tensor",
            {"serialized_named_tensors": [], "load_format": "flattened_bucket"},
            UpdateFromTensors(parts=[], form="flattened_bucket"),
        ),
        (
            "init_weights_update_group",
            {"master_address": "h", "master_port": 1, "rank_offset": 1, "world_size": 2},
            JoinUpdateGroup(
                group_name="weight_update_group",
                master_address="h",
                master_port=1,
                rank=1,
                world_size=2,
                backend="nccl",
            ),
        ),
        (
            "update_weights_from_distributed",
            {"names": ["x"], "dtypes": ["bfloat16"], "shapes": [[3]], "group_name": "g"},
            UpdateFromGroup(group_name="g", names=["x"], dtypes=["bfloat16"], shapes=[[3]]),
        ),
        (
            "destroy_weights_update_group",
            None,
            LeaveUpdateGroup(group_name="weight_update_group"),
        ),
        ("weights_checker", {"action": "snapshot"}, CheckWeights(action="snapshot")),
        ("release_memory_occupation", {"tags": ["weights"]}, ReleaseMemory(tags=["weights"])),
        ("resume_memory_occupation", None, ResumeMemory(tags=[])),
    ],
)
def test_a_route_gives_its_order(
    api: Any, engine: Any, path: str, body: dict[str, Any] | None, order: WeightOrder
) -> None:
    """And answers 400 with the reason if the engine refuses it."""
    answer = api.post(f"/{path}", body)
    assert answer.status_code == 200, answer.text
    assert answer.json()["success"]
    assert engine.calls == [OrderWeights(call_id="", order=order)]
    engine.refuses = True
    refused = api.post(f"/{path}", body)
    assert refused.status_code == 400
    assert refused.json()["message"] == "no"


def test_the_version_changes_with_the_weights(api: Any, engine: Any) -> None:
    def versions() -> set[str]:
        told = api.post("/generate", {"input_ids": [1], "sampling_params": {"max_new_tokens": 1}})
        return {
            told.json()["meta_info"]["weight_version"],
            api.get("/weight_version").json()["weight_version"],
            api.get("/get_weight_version").json()["weight_version"],
            api.get("/model_info").json()["weight_version"],
        }

    assert versions() == {"default"}
    body = {"model_path": "/b", "weight_version": "2"}
    engine.refuses = True
    api.post("/update_weights_from_disk", body)
    assert versions() == {"default"}
    engine.refuses = False
    api.post("/update_weights_from_disk", body)
    assert versions() == {"2"}
    assert api.get("/model_info").json()["model_path"] == "/b"
    named = api.post("/update_weight_version", {"new_version": "3", "abort_all_requests": False})
    assert named.json()["new_version"] == "3"
    assert versions() == {"3"}


def test_pausing(api: Any, engine: Any) -> None:
    assert api.post("/pause_generation", {"mode": "retract"}).json() == {
        "message": "generation is paused",
        "status": "ok",
    }
    assert api.get("/health").status_code == 200
    assert api.post("/pause_generation", {"mode": "never"}).status_code == 400
    assert api.post("/continue_generation", {}).json()["status"] == "ok"
    assert engine.calls == [("pause", "retract"), "resume"]


def test_reading_a_weight(api: Any, engine: Any) -> None:
    answer = api.post("/get_weights_by_name", {"name": "model.norm.weight", "truncate_size": 3})
    assert answer.json() == [[1.0]]
    assert engine.calls[0].order == ReadWeight(name="model.norm.weight", most=3)
    engine.refuses = True
    assert api.post("/get_weights_by_name", {"name": "x"}).status_code == 400


def test_what_is_no_base64_is_refused(api: Any) -> None:
    answer = api.post("/update_weights_from_tensor", {"serialized_named_tensors": ["%"]})
    assert answer.status_code == 400
    assert "no base64" in answer.text


@pytest.mark.parametrize(
    ("path", "body", "way_out"),
    [
        ("update_weights_from_ipc", {"zmq_handles": {"GPU-0": "ipc:///tmp/x"}}, "_from_tensor"),
        (
            "init_weights_send_group_for_remote_instance",
            {"master_address": "h", "ports": "1", "group_rank": 0, "world_size": 2},
            "/update_weights_from_disk",
        ),
        (
            "send_weights_to_remote_instance",
            {"master_address": "h", "ports": "1"},
            "/update_weights_from_disk",
        ),
    ],
)
def test_ways_that_there_are_not_are_refused_with_those_that_are(
    api: Any, engine: Any, path: str, body: dict[str, Any], way_out: str
) -> None:
    answer = api.post(f"/{path}", body)
    assert answer.status_code == 400
    assert way_out in answer.json()["message"]
    assert not answer.json()["success"]
    assert api.post(f"/{path}", {"nothing": 1}).status_code == 400
    assert engine.calls == []
