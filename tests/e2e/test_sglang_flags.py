"""Flags of SGLang that change what a server does: their effect, on one server that has them all."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.server import Server, serving

ASK = {"text": "Hi", "sampling_params": {"max_new_tokens": 7, "ignore_eos": True}}


@dataclass(frozen=True)
class Flagged:
    server: Server
    folder: Path

    @property
    def model(self) -> Path:
        return self.folder / "model"


@pytest.fixture(scope="module")
def flagged(qwen3: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Flagged]:
    folder = tmp_path_factory.mktemp("flagged")
    shutil.copytree(qwen3, folder / "model")
    flags = {
        "--model-path": str(folder / "model"),
        "--dtype": "float32",
        "--json-model-override-args": '{"max_position_embeddings": 64, "vocab": {"a": 1}}',
        "--preferred-sampling-params": '{"temperature": 0.0, "top_k": 7}',
        "--stream-interval": "3",
        "--fastapi-root-path": "/llm",
        "--file-storage-path": str(folder / "files"),
        "--log-level-http": "info",
        "--uvicorn-access-log-exclude-prefixes": "/health",
        "--export-metrics-to-file-dir": str(folder / "metrics"),
        "--max-prefill-tokens": "8",
        "--prefill-max-requests": "1",
        "--api-key": "a-user",
        "--admin-api-key": "an-admin",
    }
    switches = ["--delete-ckpt-after-loading", "--export-metrics-to-file"]
    numa = ["--numa-node", "0"] if Path("/sys/devices/system/node/node0").exists() else []
    words = [word for pair in flags.items() for word in pair]
    with serving(*words, *switches, *numa) as server:
        yield Flagged(server, folder)


def key(name: str = "a-user") -> dict[str, str]:
    return {"Authorization": f"Bearer {name}"}


def test_a_changed_config_is_served_and_the_models_own_stays(flagged: Flagged) -> None:
    info = httpx.get(f"{flagged.server.url}/server_info", headers=key("an-admin")).json()
    assert info["max_req_input_len"] < 64 or info["context_length"] == 64
    own = json.loads((flagged.model / "config.json").read_text())
    assert own["max_position_embeddings"] > 64


def test_what_a_request_leaves_open_is_taken_from_the_preferred_parameters(
    flagged: Flagged,
) -> None:
    answers = [
        httpx.post(f"{flagged.server.url}/generate", json=ASK, headers=key()).json()
        for _ in range(2)
    ]
    assert answers[0]["output_ids"] == answers[1]["output_ids"]
    info = httpx.get(f"{flagged.server.url}/get_model_info", headers=key()).json()
    assert info["preferred_sampling_params"] == {"temperature": 0.0, "top_k": 7}


def test_events_have_as_many_tokens_as_the_interval_after_the_first(flagged: Flagged) -> None:
    body = {**ASK, "stream": True}
    with httpx.stream(
        "POST", f"{flagged.server.url}/generate", json=body, headers=key()
    ) as response:
        events = [line[6:] for line in response.iter_lines() if line.startswith("data: {")]
    lengths = [len(json.loads(event)["output_ids"]) for event in events]
    new = [after - before for before, after in zip([0, *lengths], lengths, strict=False)]
    assert lengths[-1] == 7
    # A busy machine joins more than three; test_native_logprobs.py has the exact events.
    assert all(number >= 3 for number in new[1:-1])


def test_routes_answer_below_the_root_path_too_and_ask_for_the_same_key(flagged: Flagged) -> None:
    for path in ("/v1/models", "/llm/v1/models"):
        assert httpx.get(f"{flagged.server.url}{path}").status_code == 401
        assert httpx.get(f"{flagged.server.url}{path}", headers=key()).status_code == 200
    for path in ("/flush_cache", "/llm/flush_cache"):
        asked = httpx.post(f"{flagged.server.url}{path}", headers=key())
        assert asked.status_code in (401, 403)
    for path in ("/llm/llm/v1/models", "/llmv1/models", "/llm%2Fv1/nothing", "/llm//v1/models"):
        assert httpx.get(f"{flagged.server.url}{path}", headers=key()).status_code == 404


def test_requests_are_logged_but_for_the_excluded_paths(flagged: Flagged) -> None:
    httpx.get(f"{flagged.server.url}/v1/models", headers=key())
    httpx.get(f"{flagged.server.url}/health")
    assert "GET /v1/models" in flagged.server.log
    assert "GET /health" not in flagged.server.log


def test_files_go_to_their_own_directory(flagged: Flagged) -> None:
    upload = {"file": ("a.jsonl", b'{"a": 1}\n')}
    answer = httpx.post(
        f"{flagged.server.url}/v1/files",
        files=upload,
        data={"purpose": "batch"},
        headers=key(),
    )
    assert answer.status_code == 200, answer.text
    stored = [path for path in (flagged.folder / "files").rglob("*") if path.is_file()]
    assert any(path.read_bytes() == b'{"a": 1}\n' for path in stored)


def test_figures_of_each_request_are_exported_without_its_text(flagged: Flagged) -> None:
    secret = "a very secret prompt"
    body = {**ASK, "text": secret, "rid": "exported"}
    httpx.post(f"{flagged.server.url}/generate", json=body, headers=key())
    lines = "".join(p.read_text() for p in (flagged.folder / "metrics").iterdir()).splitlines()
    [line] = [line for line in map(json.loads, lines) if line["request_id"] == "exported"]
    assert (line["completion_tokens"], line["outcome"]) == (7, "finished")
    assert line["e2e_latency"] > 0
    assert secret not in "".join(lines)


def test_the_weights_are_gone_and_the_model_still_answers(flagged: Flagged) -> None:
    assert list(flagged.model.glob("*.safetensors")) == []
    assert (flagged.model / "tokenizer.json").exists()
    answer = httpx.post(f"{flagged.server.url}/generate", json=ASK, headers=key())
    assert answer.status_code == 200


def test_the_engine_is_bound_to_its_node(flagged: Flagged) -> None:
    if not Path("/sys/devices/system/node/node0").exists():
        pytest.skip("this machine tells of no NUMA nodes")
    assert "bound to NUMA node 0" in flagged.server.log


def test_an_idle_engine_sleeps(flagged: Flagged) -> None:
    engine = psutil.Process(flagged.server.engine_pid())
    before = sum(engine.cpu_times()[:2])
    time.sleep(0.5)
    assert sum(engine.cpu_times()[:2]) - before < 0.1
