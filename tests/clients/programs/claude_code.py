"""`claude -p`, Claude Code's command line for one question, without tools and with one.

Its own system prompt with all tools has over 12,000 tokens, more than the test model's context.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CLAUDE = Path(sys.executable).parents[1] / "node_modules" / ".bin" / "claude"
QUESTION = "What is the capital of Japan?"


def ask(folder: str, *flags: str) -> list[dict]:
    """The events of one question; the program sees no settings but these."""
    settings = {
        "PATH": os.environ["PATH"],
        "HOME": folder,
        "ANTHROPIC_BASE_URL": os.environ["CHAT_URL"],
        "ANTHROPIC_AUTH_TOKEN": "none",
        "ANTHROPIC_MODEL": "smollm2-135m",
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": "100",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        # Whatever else it would fetch must not leave this machine.
        "HTTPS_PROXY": "http://127.0.0.1:9",
        "NO_PROXY": "127.0.0.1",
    }
    command = [CLAUDE, "-p", QUESTION, "--output-format", "stream-json", "--verbose", *flags]
    done = subprocess.run(
        command, check=True, cwd=folder, env=settings, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    sys.stdout.write(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


for tools in ("", "Read"):
    with tempfile.TemporaryDirectory() as folder:
        events = ask(folder, "--system-prompt", "Answer in one sentence.", "--tools", tools)
    result = events[-1]
    assert result["type"] == "result"
    assert not result["is_error"]
    assert result["usage"]["output_tokens"] > 0
    answers = [event["message"] for event in events if event["type"] == "assistant"]
    assert answers
    assert all(answer["model"] == "smollm2-135m" for answer in answers)
