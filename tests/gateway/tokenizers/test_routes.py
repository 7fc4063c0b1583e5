"""Tokenizers by name over HTTP, and the gateway's own /v1/tokenize."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from sapwood.gateway.tokenizers import registry
from sapwood.text.tokenizer import Tokenizer
from tests.gateway.plain.plain_stub import write_tokenizer
from tests.gateway.stubs import Bench, Stub, bench


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("model") / "m")


async def settled(made: Bench, id_: str) -> dict[str, Any]:
    while True:
        told: dict[str, Any] = (await made.client.get(f"/v1/tokenizers/{id_}/status")).json()
        if told["status"] in ("completed", "failed"):
            return told
        await asyncio.sleep(0.005)


def test_tokenizers_come_and_go_by_name(directory: Path, tmp_path: Path) -> None:
    async def run() -> None:
        stub = Stub("a")
        stub.models = ["m", "n"]
        async with bench(stub, admin_api_key="boss", api_key="user") as made:
            asked = {"name": "n", "source": str(directory)}
            made.client.headers["authorization"] = "Bearer user"
            assert (await made.client.post("/v1/tokenizers", json=asked)).status_code == 403
            made.client.headers["authorization"] = "Bearer boss"
            added = await made.client.post("/v1/tokenizers", json=asked)
            assert (added.status_code, added.json()["status"]) == (202, "pending")
            id_ = added.json()["id"]
            told = await settled(made, id_)
            size = Tokenizer.from_directory(directory).vocab_size
            assert (told["status"], told["vocab_size"]) == ("completed", size)
            again = await made.client.post("/v1/tokenizers", json=asked)
            assert (again.status_code, again.json()["param"]) == (400, "name")
            bad = {"name": "bad", "source": str(tmp_path)}
            failed = await made.client.post("/v1/tokenizers", json=bad)
            assert (await settled(made, failed.json()["id"]))["status"] == "failed"
            listed = (await made.client.get("/v1/tokenizers")).json()["tokenizers"]
            assert [one["name"] for one in listed] == ["n", "bad"]
            assert (await made.client.get("/v1/tokenizers/n")).json()["id"] == id_

            mine = await made.client.post("/v1/tokenize", json={"model": "n", "prompt": "Hello"})
            assert mine.json()["char_count"] == 5
            theirs = await made.client.post("/v1/tokenize", json={"model": "m", "prompt": "Hello"})
            assert theirs.json() == {"worker": "a", "choices": []}

            gone = await made.client.delete(f"/v1/tokenizers/{id_}")
            assert gone.json()["success"] is True
            assert (await made.client.get(f"/v1/tokenizers/{id_}")).status_code == 404
            assert (await made.client.delete(f"/v1/tokenizers/{id_}")).status_code == 404
            for wrong in ({"name": "x"}, {"name": "a b", "source": "/"}, {"name": 1, "source": ""}):
                refused = await made.client.post("/v1/tokenizers", json=wrong)
                assert refused.status_code == 400

    asyncio.run(run())


def test_texts_and_ids_there_and_back(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        options = {"tokenizer_cache_enable_l0": True, "tokenizer_cache_enable_l1": True}
        async with bench(Stub("a"), tokenizer_path=str(directory), **options) as made:
            tokenizer = Tokenizer.from_directory(directory)
            texts = ["Hello world", "é" * 400, ""]
            for path in ("/v1/tokenize", "/tokenize"):
                told = (await made.post(path, prompt=texts, add_special_tokens=False)).json()
                assert told["tokens"] == [tokenizer.encode(text, False) for text in texts]
                assert told["count"] == [len(ids) for ids in told["tokens"]]
                assert told["char_count"] == [11, 400, 0]
            for path in ("/v1/detokenize", "/detokenize"):
                back = (await made.post(path, tokens=told["tokens"])).json()
                assert back == {"text": texts}
            metrics = made.gateway.metrics.exposition().decode()
            assert 'smg_tokenizer_cache_hits_total{level="l0"} 3.0' in metrics
            assert 'smg_tokenizer_cache_misses_total{level="l1"} 3.0' in metrics
            for path, wrong, param in (
                ("/v1/tokenize", {"prompt": []}, "prompt"),
                ("/v1/tokenize", {"prompt": 7}, "prompt"),
                ("/v1/tokenize", {"prompt": "x" * (5 << 20)}, "prompt"),
                ("/v1/tokenize", {"prompt": ["x" * (3 << 20)] * 2}, "prompt"),
                ("/v1/detokenize", {"tokens": [10**6]}, "tokens"),
                ("/v1/detokenize", {"tokens": [-1]}, "tokens"),
                ("/v1/detokenize", {"tokens": [[1], 2]}, "tokens"),
                ("/v1/detokenize", {"tokens": ["a"]}, "tokens"),
            ):
                refused = await made.post(path, **wrong)
                assert refused.status_code == 400, (wrong, refused.text)
                assert str(refused.json()["param"]).startswith(param)
            monkeypatch.setattr(registry, "MAX_WAITING", 0)
            full = await made.post("/v1/tokenize", prompt="x" * 300)
            assert full.status_code == 503

    asyncio.run(run())
