"""A storage that is attached, detached and cleared while a server serves, with SGLang's codes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import serving
from tests.tiny import save_llama

PATH = "/hicache/storage-backend"
PROMPT = [3 + index % 200 for index in range(60)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llama(tmp_path_factory.mktemp("tier-routes"))


def flags(model: Path, *more: str) -> list[str]:
    own = ["--model", str(model), "--max-total-tokens", "512", "--enable-hierarchical-cache"]
    return [*own, "--page-size", "8", "--dtype", "float32", *more]


def generate(client: httpx.Client) -> dict[str, Any]:
    params = {"max_new_tokens": 4, "temperature": 0}
    answer = client.post("/generate", json={"input_ids": PROMPT, "sampling_params": params})
    found: dict[str, Any] = answer.raise_for_status().json()
    return found


def test_attach_detach_status_and_clear(model: Path, tmp_path: Path) -> None:
    extra = json.dumps(
        {"directory": str(tmp_path / "kv"), "prefetch_threshold": 8, "encryption_key": "ab" * 32}
    )
    attach = {
        "hicache_storage_backend": "file",
        "hicache_storage_backend_extra_config_json": extra,
        "hicache_storage_prefetch_policy": "wait_complete",
    }
    with serving(*flags(model, "--admin-api-key", "boss", "--enable-metrics")) as server:
        assert httpx.put(server.url + PATH, json=attach).status_code == 401
        with httpx.Client(
            base_url=server.url, headers={"Authorization": "Bearer boss"}, timeout=30
        ) as client:
            status = client.get(PATH).json()
            assert status["hicache_storage_backend"] is None
            assert status["hicache_write_policy"] == "write_through"
            assert client.post(PATH + "/clear").status_code == 400, "nothing is attached"
            assert client.put(PATH, json=attach).status_code == 200
            again = client.put(PATH, json={**attach, "hicache_write_policy": "write_back"})
            assert again.status_code == 200
            status = client.get(PATH).json()
            assert status["hicache_storage_backend"] == "file"
            assert status["hicache_write_policy"] == "write_back"
            assert status["hicache_storage_prefetch_policy"] == "wait_complete"
            assert "abab" not in json.dumps(status)
            other = {**attach, "hicache_storage_backend": "redis"}
            other["hicache_storage_backend_extra_config_json"] = '{"url": "redis://127.0.0.1:1"}'
            assert client.put(PATH, json=other).status_code == 400
            for wrong in (
                {"hicache_storage_backend": "dynamic"},
                {"hicache_storage_backend": "\0" * 100},
                {**attach, "hicache_storage_prefetch_policy": "never"},
                {**attach, "hicache_storage_backend_extra_config_json": "[" * 10_000},
                {**attach, "hicache_write_policy": 7},
                {},
            ):
                assert client.put(PATH, json=wrong).status_code in (400, 422), wrong
            assert client.put(PATH, json={**attach, "hicache_write_policy": "write_through"})
            first = generate(client)
            client.post("/flush_cache").raise_for_status()
            second = generate(client)
            assert second["output_ids"] == first["output_ids"]
            details = second["meta_info"]["cached_tokens_details"]
            assert details == {"device": 0, "host": 0, "storage": 56}
            assert second["meta_info"]["cached_tokens"] == 56
            told = client.get("/metrics").text
            assert "prefetched_tokens_total" in told
            # The page does not ask the engine: it may be some seconds old.
            assert client.get("/dashboard/figures").json()["tiers"]["num_host_slots"] > 0
            assert client.get("/server_info").text.count("abab") == 0
            for _ in range(2):
                assert client.delete(PATH).status_code == 200
            assert client.get(PATH).json()["hicache_storage_prefetch_policy"] == "wait_complete"
            client.post("/flush_cache").raise_for_status()
            assert generate(client)["meta_info"]["cached_tokens"] == 0
            assert client.put(PATH, json=attach).status_code == 200
            assert client.post("/clear_hicache_storage_backend").status_code == 200
            assert list((tmp_path / "kv").iterdir()) == []


def test_without_an_admin_key_nothing_is_steered(model: Path) -> None:
    with serving(*flags(model)) as server, httpx.Client(base_url=server.url, timeout=30) as client:
        assert client.put(PATH, json={"hicache_storage_backend": "file"}).status_code == 400
        assert client.delete(PATH).status_code == 400
        assert client.get(PATH).status_code == 400
