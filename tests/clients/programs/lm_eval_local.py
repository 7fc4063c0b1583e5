"""lm-eval's generate_until by chat and loglikelihood by completions, on a task of four lines."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CAPITALS = {"France": "Paris", "Italy": "Rome", "Japan": "Tokyo", "Spain": "Madrid"}
COMMON = {"task": None, "dataset_path": "json", "test_split": "train"}
GENERATED = {
    "output_type": "generate_until",
    "doc_to_text": "What is the capital of {{country}}?",
    "doc_to_target": "{{capital}}",
    "generation_kwargs": {"max_gen_toks": 20, "until": ["\n"], "temperature": 0},
    "metric_list": [{"metric": "exact_match"}],
}
CHOSEN = {
    "output_type": "multiple_choice",
    "doc_to_text": "The capital of {{country}} is",
    "doc_to_choice": ["Paris", "Rome", "Tokyo", "Madrid"],
    "doc_to_target": "{{capital}}",
    "metric_list": [{"metric": "acc"}],
}


def run(folder: Path, model: str, arguments: str, task: str, *flags: str) -> dict:
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--model_args", arguments]
    command += ["--tasks", task, "--include_path", str(folder), "--output_path", str(folder)]
    subprocess.run([*command, *flags], check=True)
    [found] = sorted(folder.rglob("results_*.json"))
    results = json.loads(found.read_text())["results"][task]
    found.unlink()
    return results


def main() -> None:
    url = os.environ["CHAT_URL"]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = folder / "capitals.json"
        lines = [{"country": country, "capital": city} for country, city in CAPITALS.items()]
        data.write_text("\n".join(map(json.dumps, lines)))
        for task, rest in (("capitals", GENERATED), ("choices", CHOSEN)):
            fields = COMMON | rest | {"task": task, "dataset_kwargs": {"data_files": str(data)}}
            (folder / f"{task}.yaml").write_text(json.dumps(fields))
        chat = f"model=smollm2-135m,base_url={url}/v1/chat/completions,num_concurrent=2"
        told = run(folder, "local-chat-completions", chat, "capitals", "--apply_chat_template")
        assert "exact_match,none" in told, told
        scored = f"model=smollm2-135m,base_url={url}/v1/completions,tokenizer_backend=huggingface"
        scored += f",tokenizer={os.environ['TOKENIZER']}"
        told = run(folder, "local-completions", scored, "choices")
        assert told["acc,none"] >= 0.5, told


main()
