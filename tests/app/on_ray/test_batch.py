"""Batches by Ray Data: which lines are asked, and a run that is interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sapwood.app.on_ray.batch import find_pending

LIMIT_S = 400.0


def write_lines(path: Path, count: int) -> None:
    with path.open("w") as file:
        for i in range(count):
            line = {"id": f"r{i}", "prompt": [1, 2, i % 250], "sampling_params": {}}
            line["sampling_params"] = {"max_new_tokens": 4, "temperature": 0, "ignore_eos": True}
            file.write(json.dumps(line) + "\n")


def test_only_lines_without_an_answer_are_pending(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    lines = ['{"id": "a", "prompt": "x"}', "", '{"id": "b", "prompt": "x"}', "no json"]
    lines += ['{"id": "a", "prompt": "x"}', '{"prompt": "x"}', '{"id": "a2", "prompt": "ö"}']
    source.write_bytes(b"\xef\xbb\xbf" + "\n".join(lines).encode())
    found = find_pending(source, set())
    assert list(found.numbers) == [1, 3, 6, 7]
    with source.open("rb") as file:
        for number, offset in zip(found.numbers, found.offsets, strict=True):
            file.seek(offset)
            raw = file.readline().removeprefix(b"\xef\xbb\xbf")
            assert raw.rstrip(b"\n").decode() == lines[number - 1]
    [broken, twice] = [reply.answer for reply in found.refused]
    assert broken["id"] == "line-4"
    assert "that of line 1 too" in twice["error"]["message"]
    again = find_pending(source, {"a", "line-4", "line-6"})
    assert list(again.numbers) == [3, 7]
    assert again.num_skipped == 4
    assert not again.refused


@pytest.mark.long
def test_each_of_ten_thousand_lines_is_answered_once(tmp_path: Path, tiny_llama: Path) -> None:
    pytest.importorskip("ray", reason="Ray is not installed: pip install 'sapwood[ray]'")
    source, target = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    count = 10_000
    write_lines(source, count)
    command = [
        *(sys.executable, "-m", "sapwood", "generate", str(source), "-o", str(target)),
        *("--engine", "ray", "--ray-engines", "2", "--model", str(tiny_llama)),
        *("--load-format", "dummy", "--dtype", "float32", "--max-total-tokens", "16384"),
        *("--num-threads", "1"),
    ]
    first = subprocess.Popen(command, stderr=subprocess.PIPE)
    end = time.monotonic() + LIMIT_S
    while not target.exists() or target.read_bytes().count(b"\n") < count // 10:
        assert first.poll() is None, first.communicate()[1].decode()[-2000:]
        assert time.monotonic() < end
        time.sleep(0.1)
    first.send_signal(signal.SIGINT)
    told = first.communicate(timeout=LIMIT_S)[1].decode()
    assert first.returncode == 130, told
    assert "the same command answers the rest" in told
    num_before = target.read_bytes().count(b"\n")
    assert count // 10 <= num_before < count
    second = subprocess.run(command, stderr=subprocess.PIPE, timeout=LIMIT_S, check=False)
    assert second.returncode == 0, second.stderr.decode()[-2000:]
    assert f"{num_before} were done before" in second.stderr.decode()
    answers = [json.loads(line) for line in target.read_text().splitlines()]
    assert sorted(one["id"] for one in answers) == sorted(f"r{i}" for i in range(count))
    assert all(len(one["output_ids"]) == 4 for one in answers)
