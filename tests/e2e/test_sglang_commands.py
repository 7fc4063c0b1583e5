"""Commands that SGLang's documentation starts servers with, word for word but for the checkpoint,
the port, and the number of ranks: they start here, and answer.

Sources: the pages of docs.sglang.io on these models, as of January 2026.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.server import serving
from tests.models.lm.cases import peer_of
from tests.tiers import long_only
from tests.tiny import VOCAB, write_tokenizer


@dataclass(frozen=True)
class Command:
    """case: of tests/models/lm/cases.py, whose form stands for the model's."""

    words: str
    case: str
    fields: dict[str, Any] = field(default_factory=dict)
    ranks: int = 1


COMMANDS = {
    "Llama 3.1": Command(
        "--model-path meta-llama/Meta-Llama-3.1-8B-Instruct --host 0.0.0.0 --port 30000 "
        "--enable-metrics --mem-fraction-static 0.8 --chunked-prefill-size 4096 "
        "--log-level info",
        "mistral, window",
    ),
    "DeepSeek V3": Command(
        "--model deepseek-ai/DeepSeek-V3 --tp 8 --trust-remote-code --enable-torch-compile "
        "--torch-compile-max-bs 8 --tool-call-parser deepseekv3",
        "deepseek_v3",
        ranks=2,
    ),
    "DeepSeek V3's drafts": Command(
        "--model-path deepseek-ai/DeepSeek-V3-0324 --speculative-algorithm EAGLE "
        "--speculative-num-steps 1 --speculative-eagle-topk 1 --speculative-num-draft-tokens 2 "
        "--trust-remote-code --tp 8",
        "deepseek_v3",
        {"num_nextn_predict_layers": 1},
    ),
    "DeepSeek V3.2": Command(
        "--model deepseek-ai/DeepSeek-V3.2-Exp --tp 8 --reasoning-parser deepseek-v3 "
        "--tool-call-parser deepseekv31",
        "deepseek_v32",
    ),
    "gpt-oss": Command(
        "--model-path openai/gpt-oss-120b --tp 2 --reasoning-parser gpt-oss "
        "--tool-call-parser gpt-oss",
        "gpt_oss",
        ranks=2,
    ),
    "GLM-4.6": Command(
        "--model zai-org/GLM-4.6-FP8 --tp-size 8 --tool-call-parser glm45 --reasoning-parser glm45 "
        "--speculative-algorithm EAGLE --speculative-num-steps 3 --speculative-eagle-topk 1 "
        "--speculative-num-draft-tokens 4 --mem-fraction-static 0.7 "
        "--disable-shared-experts-fusion --served-model-name glm-4.6-fp8 --host 0.0.0.0 "
        "--port 8000",
        "glm4_moe",
        {"num_nextn_predict_layers": 1},
    ),
    "Llama 4": Command(
        "--model-path meta-llama/Llama-4-Scout-17B-16E-Instruct --tp 8 --context-length 256 "
        "--attention-backend fa3 --enable-multimodal",
        "llama4",
    ),
    "MiniMax M2": Command(
        "--model-path MiniMaxAI/MiniMax-M2 --tp-size 4 --tool-call-parser minimax-m2 "
        "--reasoning-parser minimax-append-think --host 0.0.0.0 --trust-remote-code --port 8000 "
        "--mem-fraction-static 0.85",
        "minimax_m2",
    ),
    "Qwen3-Next": Command(
        "--model Qwen/Qwen3-Next-80B-A3B-Instruct --tp 4 --mamba-scheduler-strategy extra_buffer "
        "--page-size 64 --tool-call-parser qwen",
        "qwen3_next",
    ),
    "Qwen3": Command(
        "--model-path Qwen/Qwen3-30B-A3B --reasoning-parser qwen3 --tool-call-parser qwen25 "
        "--host 0.0.0.0 --enable-mixed-chunk --schedule-conservativeness 0.3",
        "qwen3_moe",
    ),
    "Kimi K2": Command(
        "--model-path moonshotai/Kimi-K2-Instruct --tp 8 --trust-remote-code "
        "--tool-call-parser kimi_k2",
        "deepseek_v3, one group",
    ),
}
OFTEN = ("DeepSeek V3's drafts", "MiniMax M2")
SIZES = {"--tp", "--tp-size"}
CHECKPOINT = {"--model", "--model-path"}
OWN = {"--host", "--port"}


def write_checkpoint(directory: Path, command: Command) -> None:
    peer = peer_of(command.case, vocab_size=VOCAB, eos_token_id=257, **command.fields)
    (directory / "config.json").write_text(json.dumps(peer.hf_config))
    write_tokenizer(directory)


def as_here(command: Command, directory: Path) -> list[str]:
    """The command's words with the tiny checkpoint, as many ranks, and the test's own address."""
    words = shlex.split(command.words)
    found: list[str] = []
    while words:
        flag = words.pop(0)
        if flag in OWN:
            words.pop(0)
            continue
        found.append(flag)
        if flag in SIZES | CHECKPOINT:
            words.pop(0)
            found.append(str(directory) if flag in CHECKPOINT else str(command.ranks))
    return found


@pytest.mark.parametrize(
    "name", [*OFTEN, *long_only(*(one for one in COMMANDS if one not in OFTEN))]
)
def test_the_documented_command_starts_and_answers(name: str, tmp_path: Path) -> None:
    command = COMMANDS[name]
    write_checkpoint(tmp_path, command)
    small = ["--load-format", "dummy", "--max-total-tokens", "2048", "--num-threads", "1"]
    with serving(*as_here(command, tmp_path), *small) as server:
        body = {"text": "Hello", "sampling_params": {"max_new_tokens": 9, "ignore_eos": True}}
        answer = httpx.post(f"{server.url}/generate", json=body, timeout=60).json()
        assert len(answer["output_ids"]) == 9
        messages = [{"role": "user", "content": "Hello"}]
        model = httpx.get(f"{server.url}/v1/models", timeout=60).json()["data"][0]["id"]
        chat = httpx.post(
            f"{server.url}/v1/chat/completions",
            json={"model": model, "messages": messages, "max_tokens": 5},
            timeout=60,
        )
        assert chat.status_code == 200, chat.text
