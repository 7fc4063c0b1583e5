"""sglang.bench_one_batch_server and sglang.profiler against a running server; with the argument
`bench` only the first."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

URL = os.environ["CHAT_URL"]
TEXT = "The oak grows slowly and stands for many hundred years. " * 40
TURNS = [{"from": "human", "value": TEXT}, {"from": "gpt", "value": TEXT}]

with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    data = folder / "conversations.json"
    data.write_text(json.dumps([{"conversations": TURNS} for _ in range(16)]))
    result = folder / "result.jsonl"
    bench = [sys.executable, "-m", "sglang.bench_one_batch_server", "--model", "None"]
    bench += ["--base-url", URL, "--batch-size", "1", "4", "--input-len", "64"]
    bench += ["--output-len", "16", "--dataset-path", str(data), "--skip-warmup"]
    subprocess.run([*bench, "--result-filename", str(result)], check=True)
    rows = [json.loads(line) for line in result.read_text().splitlines()]
    assert [row["batch_size"] for row in rows] == [1, 4], rows
    if sys.argv[1:] != ["bench"]:
        profile = [sys.executable, "-m", "sglang.profiler", "--url", URL, "--num-steps", "3"]
        subprocess.run([*profile, "--output-dir", str(folder / "profile")], check=True)
        [told] = (folder / "profile").rglob("server_args.json")
        assert json.loads(told.read_text())["tokenizer_path"]
