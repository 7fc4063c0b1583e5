"""Questions whose answer is a Python function that passes its tests: HumanEval.

Source: Chen et al. 2021, "Evaluating large language models trained on code".
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from sapwood.bench.evals.questions import Grade, Question, column, read_lines

TIMEOUT_S = 10.0
MEMORY_BYTES = 1 << 30
FILE_BYTES = 1 << 20
_START = f"""
import resource, sys
for what, limit in (
    (resource.RLIMIT_CPU, {int(TIMEOUT_S) + 1}),
    (resource.RLIMIT_AS, {MEMORY_BYTES}),
    (resource.RLIMIT_FSIZE, {FILE_BYTES}),
    (resource.RLIMIT_CORE, 0),
):
    resource.setrlimit(what, (limit, limit))
exec(compile(sys.stdin.read(), "answer", "exec"), {{"__name__": "__main__"}})
"""
_FENCED = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)


def program_of(text: str, prompt: str, entry_point: str) -> str:
    """The program that an answer gives: its fenced code, or the prompt's function gone on with."""
    blocks = [block for block in _FENCED.findall(text) if f"def {entry_point}" in block]
    if blocks:
        # The prompt's imports and helpers come first; the block defines the function anew.
        return f"{_before(prompt, entry_point)}\n{blocks[-1]}"
    if f"def {entry_point}" in text:
        return f"{_before(prompt, entry_point)}\n{text[text.index(f'def {entry_point}') :]}"
    fenced = _FENCED.search(text)
    return prompt + (fenced[1] if fenced else text)


def _before(prompt: str, entry_point: str) -> str:
    return prompt[: prompt.rindex(f"def {entry_point}")] if f"def {entry_point}" in prompt else ""


def passes(program: str) -> bool:
    """Run a program in a process of its own, in an empty folder: whether it runs to its end.

    The process has limits of time, memory and file size, and no environment. It is not a sandbox:
    it may read what its user may read, and reach the network.
    """
    # A program that leaves early by sys.exit(0) does not say the word.
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-I", "-c", _START],
            cwd=folder,
            env={},
            stdin=subprocess.PIPE,
            stdout=said,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            process.communicate(f"{program}\nprint({word!r})\n".encode(), TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return False
        finally:
            _end(process)
        said.seek(0)
        return process.returncode == 0 and said.read().rstrip().endswith(word.encode())


def _end(process: subprocess.Popen[bytes]) -> None:
    """End the process and all that it started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError):  # all of them have ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


class HumanEval:
    """Lines of JSON with "task_id", "prompt", "entry_point" and "test" (HumanEval.jsonl[.gz])."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        return [
            Question(
                name=column(row, "task_id", path),
                content="Complete this Python function. Answer with the whole function in one "
                f"block of code.\n\n```python\n{column(row, 'prompt', path)}```",
                expected=column(row, "test", path),
                details={
                    "prompt": column(row, "prompt", path),
                    "entry_point": column(row, "entry_point", path),
                },
            )
            for path in paths
            for row in read_lines(path)
        ]

    def grade(self, question: Question, text: str) -> Grade:
        entry_point = question.details["entry_point"]
        program = program_of(text, question.details["prompt"], entry_point)
        score = float(passes(f"{program}\n\n{question.expected}\n\ncheck({entry_point})\n"))
        return Grade(score=score, extracted=program)
