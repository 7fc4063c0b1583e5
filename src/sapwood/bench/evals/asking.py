"""Puts questions to a server over OpenAI's chat API, and grades its answers."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sapwood.bench.evals.options import EvalOptions
from sapwood.bench.evals.questions import Grade, Question, Task
from sapwood.bench.http_stream import Endpoint, HttpError, fetch_json

THOUGHT_END = "</think>"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answered:
    """A question with one of its answers.

    error       why there is none; it counts as wrong
    num_tokens  of the answer, its thinking included, as the server counts them
    """

    question: Question
    grade: Grade
    text: str
    finish: str | None = None
    num_tokens: int = 0
    error: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """A server with the name of its model."""

    endpoint: Endpoint
    model: str
    headers: Mapping[str, str]


async def ask_all(
    servers: Sequence[Server],
    task: Task,
    questions: Sequence[Question],
    options: EvalOptions,
    on_answer: Callable[[], None],
) -> list[list[Answered]]:
    """Every question to every server, `--repeat` times; the answers of each server in order.

    Servers are asked the same question next to each other, so that the machine's mood is shared.
    """
    turns = asyncio.Semaphore(options.max_concurrency)

    async def ask_one(server: Server, question: Question, repeat: int) -> Answered:
        async with turns:
            answered = await _ask(server, task, question, options, options.seed + repeat)
        on_answer()
        return answered

    asked = [
        (index, ask_one(server, question, repeat))
        for question in questions
        for repeat in range(options.repeat)
        for index, server in enumerate(servers)
    ]
    answers = await asyncio.gather(*(coroutine for _, coroutine in asked))
    found: list[list[Answered]] = [[] for _ in servers]
    for (index, _), answered in zip(asked, answers, strict=True):
        found[index].append(answered)
    return found


async def _ask(
    server: Server, task: Task, question: Question, options: EvalOptions, seed: int
) -> Answered:
    try:
        answer = await fetch_json(
            server.endpoint,
            "POST",
            "/v1/chat/completions",
            body=_body(server.model, question, options, seed),
            headers=server.headers,
            timeout_s=options.request_timeout,
        )
        text, finish, num_tokens = _read(answer)
    except HttpError as error:
        return Answered(
            question=question, grade=Grade(score=0.0, extracted=None), text="", error=str(error)
        )
    # A program may run for seconds.
    grade = await asyncio.to_thread(task.grade, question, text.rpartition(THOUGHT_END)[2])
    return Answered(question=question, grade=grade, text=text, finish=finish, num_tokens=num_tokens)


def _body(model: str, question: Question, options: EvalOptions, seed: int) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": question.content}],
        "max_tokens": options.max_tokens,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": seed,
    }
    if options.top_k is not None:
        body["top_k"] = options.top_k
    if options.reasoning_effort is not None:
        body["reasoning_effort"] = options.reasoning_effort
    if options.thinking is not None:
        # Qwen's templates and DeepSeek's name the switch differently; a template reads its own.
        thinks = options.thinking == "on"
        body["chat_template_kwargs"] = {"enable_thinking": thinks, "thinking": thinks}
    return body


def _read(answer: object) -> tuple[str, str | None, int]:
    """The text, the reason of its end, and the count of its tokens."""
    try:
        choice = answer["choices"][0]  # type: ignore[index]
        text = choice["message"].get("content") or ""
        usage = answer.get("usage") or {}  # type: ignore[attr-defined]
        return str(text), choice.get("finish_reason"), int(usage.get("completion_tokens") or 0)
    except (TypeError, KeyError, IndexError, AttributeError, ValueError) as error:
        raise HttpError(f"not an answer of the chat API: {str(answer)[:200]}") from error


def drawn(questions: Sequence[Question], count: int | None, seed: int) -> list[Question]:
    """`count` of the questions, drawn with the seed, in the order of the files."""
    if count is None or count >= len(questions):
        return list(questions)
    chosen = sorted(random.Random(f"questions/{seed}").sample(range(len(questions)), count))
    return [questions[index] for index in chosen]
