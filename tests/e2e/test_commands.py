"""The commands as a shell runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import httpx
import pytest

from tests.e2e.server import Server

NUM_LINES = 120


def sapwood(*arguments: str, text: str | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "sapwood", *arguments],
        input=text,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_a_batch_that_was_killed_goes_on_and_answers_each_line_once(
    qwen3: Path, tmp_path: Path
) -> None:
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    sampling = {"temperature": 0, "max_new_tokens": 200, "ignore_eos": True}
    source.write_text(
        "".join(
            json.dumps({"id": f"line {i}", "prompt": f"number {i}", "sampling_params": sampling})
            + "\n"
            for i in range(NUM_LINES)
        )
    )
    flags = ["--model", str(qwen3), "--in-flight", "2", "--num-threads", "1"]
    command = [sys.executable, "-m", "sapwood", "generate", str(source), "-o", str(target), *flags]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 60
        while not target.exists() or target.read_bytes().count(b"\n") < 5:
            assert process.poll() is None
            assert time.monotonic() < end
            time.sleep(0.002)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait(10) == -signal.SIGKILL
    num_before = target.read_bytes().count(b"\n")
    assert 5 <= num_before < NUM_LINES
    # As if the last write had been cut short.
    with target.open("ab") as output:
        output.write(b'{"id": "line 7", "te')
    again = sapwood("generate", str(source), "-o", str(target), "--model", str(qwen3))
    assert again.returncode == 0, again.stderr
    assert f"{num_before} were done before" in again.stderr
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert Counter(answer["id"] for answer in answers) == Counter(
        f"line {i}" for i in range(NUM_LINES)
    )
    assert all(answer["error"] is None and len(answer["output_ids"]) == 200 for answer in answers)


def test_chat_with_a_server(qwen3_server: Server) -> None:
    flags = ("--temperature", "0", "--max-new-tokens", "12")
    told = sapwood("chat", "--url", qwen3_server.url, "-m", "Hello", *flags)
    assert told.returncode == 0, told.stderr
    body = {
        "messages": [{"role": "user", "content": "Hello"}],
        "temperature": 0,
        "max_tokens": 12,
    }
    answer = httpx.post(f"{qwen3_server.url}/v1/chat/completions", json=body, timeout=60).json()
    assert told.stdout.rstrip("\n") == answer["choices"][0]["message"]["content"].rstrip("\n")
    piped = sapwood("chat", "--url", qwen3_server.url, *flags, text="Hello\n")
    assert piped.stdout == told.stdout


def test_chat_with_a_server_that_is_not_there() -> None:
    told = sapwood("chat", "--url", "http://127.0.0.1:9", "-m", "Hello")
    assert told.returncode == 1
    assert "does not answer" in told.stderr
    assert "Traceback" not in told.stderr


def test_check_tells_what_would_run(qwen3: Path) -> None:
    told = sapwood("check", "--json", "--model", str(qwen3), "--page-size", "8")
    assert told.returncode == 0, told.stderr
    report = json.loads(told.stdout)
    rows = {row["name"]: row for part in report.values() if part for row in part}
    assert rows["page_size"]["value"] == 8
    assert "command line" in rows["page_size"]["why"]
    assert rows["context_length"]["value"] == 256


@pytest.mark.parametrize("command", ["serve", "check", "generate"])
def test_an_unknown_flag_is_wrong_usage(command: str) -> None:
    told = sapwood(command, "--page-sise", "8")
    assert told.returncode == 2
    assert "--page-sise" in told.stderr
    assert "--page-size" in told.stderr


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("page-sise: 8\n", "'page-sise'; did you mean page_size"),
        ("page-size: many\n", "page_size is 'many'"),
        ("- a\n- b\n", "holds no mapping"),
        ("page-size: [\n", "is not YAML"),
        (None, "cannot be read"),
    ],
)
def test_a_wrong_config_file_is_named(tmp_path: Path, content: str | None, words: str) -> None:
    path = tmp_path / "config.yaml"
    if content is not None:
        path.write_text(content)
    told = sapwood("serve", "--config", str(path))
    assert told.returncode == 1
    assert words in told.stderr
    assert str(path) in told.stderr
    assert "Traceback" not in told.stderr
