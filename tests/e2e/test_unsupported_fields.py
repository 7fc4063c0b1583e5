"""`sapwood serve --unsupported-fields warn` with a real server, and a window of penalties in it."""

from __future__ import annotations

import httpx

from tests.e2e.server import serving
from tests.tiny import write_llama


def test_a_server_that_warns_answers_and_names_the_fields(tmp_path) -> None:
    model = write_llama(tmp_path / "m")
    flags = ("--load-format", "dummy", "--unsupported-fields", "warn")
    with serving("--model", str(model), *flags) as server:
        sampling = {"max_new_tokens": "4", "temperature": 0, "ignore_eos": True, "colour": "red"}
        body = {"input_ids": [1, 2, 3], "sampling_params": sampling, "return_entropy": True}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60)
        assert answer.status_code == 200, answer.text
        named = "return_entropy, sampling_params.colour"
        assert answer.headers["x-sapwood-unsupported-fields"] == named
        assert server.log.count(f"/generate: answered without the unsupported fields {named}") == 1

        def written(**extra: object) -> str:
            asked = {"prompt": [1, 2, 3], "max_tokens": 24, "temperature": 0, "ignore_eos": True}
            told = httpx.post(f"{server.url}/v1/completions", json={**asked, **extra}, timeout=60)
            assert "x-sapwood-unsupported-fields" not in told.headers
            return str(told.raise_for_status().json()["choices"][0]["text"])

        plain = written()
        penalties = {"repetition_penalty": 1.9, "frequency_penalty": 2.0}
        assert written(**penalties, repeat_last_n=0) == plain
        assert written(**penalties, repeat_last_n=-1) == written(**penalties)
        assert written(**penalties, repeat_last_n=500) == written(**penalties)
        assert written(**penalties) != plain
