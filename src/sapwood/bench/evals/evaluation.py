"""`sapwood bench eval`, after its options are parsed: ask, grade, compare, write."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvloop
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sapwood.base.errors import ConfigError
from sapwood.bench.environment import Environment, describe_environment
from sapwood.bench.evals.asking import Answered, Server, ask_all, drawn
from sapwood.bench.evals.options import EvalOptions
from sapwood.bench.evals.questions import Question
from sapwood.bench.evals.scores import Difference, difference, score_of
from sapwood.bench.evals.tasks import EVALS
from sapwood.bench.http_stream import Endpoint
from sapwood.bench.report import options_json, report_stem, write_json
from sapwood.bench.serving import first_model_of
from sapwood.store import Progress

KIND = "eval"
MAX_FAILURES_SHOWN = 5


def bench_eval(options: EvalOptions, console: Console, progress: Progress) -> bool:
    """Ask the questions, show and write scores; False if a question got no answer."""
    task = EVALS.get(options.eval_name)()
    questions = task.read(options.paths, num_shots=options.num_shots, seed=options.seed)
    questions = drawn(questions, options.num_examples, options.seed)
    if not questions:
        raise ConfigError("--data has no questions")
    earlier = _earlier(options)
    environment = describe_environment()
    console.print(str(environment), markup=False, soft_wrap=True)

    async def run() -> tuple[list[Server], list[list[Answered]]]:
        urls = [url for url in (options.url, options.baseline_url) if url is not None]
        servers = [await _server(url, options) for url in urls]
        progress.start("answers", len(servers) * options.repeat * len(questions))
        try:
            found = await ask_all(servers, task, questions, options, lambda: progress.advance(1))
        finally:
            progress.finish()
        return servers, found

    start = time.perf_counter()
    servers, answers = uvloop.run(run())
    seconds = time.perf_counter() - start
    for server, of_server in zip(servers, answers, strict=True):
        console.print(
            _score_table(f"{options.eval_name}, {server.model} at {server.endpoint}", of_server)
        )
        _show_failures(of_server, console)
    if len(servers) == 2:
        _show_difference(str(servers[1].endpoint), answers[0], _means(answers[1]), console)
    if earlier is not None:
        _show_difference(str(options.compare_with), answers[0], earlier, console)
    _write(options, environment, servers, answers, seconds, console)
    return all(answered.error is None for of_server in answers for answered in of_server)


async def _server(url: str, options: EvalOptions) -> Server:
    endpoint = Endpoint.parse(url)
    model = options.model or await first_model_of(endpoint, options.headers)
    return Server(endpoint=endpoint, model=model, headers=options.headers)


def _means(answers: Sequence[Answered]) -> dict[str, float]:
    """Each question's mean score over its repeats."""
    scores: defaultdict[str, list[float]] = defaultdict(list)
    for answered in answers:
        scores[answered.question.name].append(answered.grade.score)
    return {name: sum(values) / len(values) for name, values in scores.items()}


def _score_table(title: str, answers: Sequence[Answered]) -> Table:
    """A row for all questions and, where questions have subjects, one for each.

    Tokens are the mean of an answer's."""
    of_category: defaultdict[str, list[Answered]] = defaultdict(list)
    for answered in answers:
        if answered.question.category is not None:
            of_category[answered.question.category].append(answered)
    table = Table(title=Text(title), title_justify="left")
    table.add_column("questions of")
    for name in ("answers", "score", "95% interval", "tokens", "cut off", "failed"):
        table.add_column(name, justify="right")
    for name, some in [*sorted(of_category.items()), ("all", list(answers))]:
        # Repeats of a question are no further questions: the interval counts each once.
        interval = score_of(list(_means(some).values()))
        table.add_row(
            Text(name),
            str(len(some)),
            f"{interval.mean:.3f}",
            f"{interval.low:.3f} to {interval.high:.3f}",
            f"{sum(answered.num_tokens for answered in some) / len(some):.0f}",
            str(sum(answered.finish == "length" for answered in some)),
            str(sum(answered.error is not None for answered in some)),
        )
    return table


def _show_failures(answers: Sequence[Answered], console: Console) -> None:
    failed = [answered for answered in answers if answered.error is not None]
    for answered in failed[:MAX_FAILURES_SHOWN]:
        line = f"warning: {answered.question.name}: {answered.error}"
        console.print(line, style="yellow", markup=False, soft_wrap=True)


def _show_difference(
    other: str, answers: Sequence[Answered], scores: Mapping[str, float], console: Console
) -> None:
    found = difference(_means(answers), scores)
    console.print(_difference_text(other, found), markup=False, soft_wrap=True)


def _difference_text(other: str, found: Difference | None) -> str:
    if found is None:
        return f"minus {other}: fewer than two questions in common, so nothing to compare"
    verdict = "" if found.is_clear else "; this may be chance"
    return (
        f"minus {other}, on {found.num_questions} questions: {found.interval}, "
        f"{found.better} better and {found.worse} worse{verdict}"
    )


def _earlier(options: EvalOptions) -> dict[str, float] | None:
    """Scores by question of --compare-with; ConfigError if it is no result of this evaluation."""
    if options.compare_with is None:
        return None
    path = Path(options.compare_with).expanduser()
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["kind"] != KIND or content["options"]["eval_name"] != options.eval_name:
            raise ConfigError(
                f"--compare-with {path} is not a result of --eval-name {options.eval_name}"
            )
        return {str(name): float(score) for name, score in content["servers"][0]["scores"].items()}
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise ConfigError(f"--compare-with {path} cannot be read: {error!r}") from error


def _write(
    options: EvalOptions,
    environment: Environment,
    servers: Sequence[Server],
    answers: Sequence[Sequence[Answered]],
    seconds: float,
    console: Console,
) -> None:
    path = Path(options.output_dir).expanduser()
    path /= f"{report_stem(KIND, [options.eval_name], environment)}.json"
    content = {
        "kind": KIND,
        "environment": environment,
        "options": options_json(options),
        "seconds": seconds,
        "servers": [
            _of_server(server, of_server)
            for server, of_server in zip(servers, answers, strict=True)
        ],
    }
    write_json(path, content)
    console.print(f"written: {path}", markup=False, soft_wrap=True)


def _of_server(server: Server, answers: Sequence[Answered]) -> dict[str, Any]:
    means = _means(answers)
    interval = score_of(list(means.values()))
    return {
        "url": str(server.endpoint),
        "model": server.model,
        "score": interval.mean,
        "interval": [interval.low, interval.high],
        "scores": means,
        "answers": [_as_json(answered) for answered in answers],
    }


def _as_json(answered: Answered) -> dict[str, Any]:
    question: Question = answered.question
    return {
        "question": question.name,
        "category": question.category,
        "expected": question.expected,
        "extracted": answered.grade.extracted,
        "score": answered.grade.score,
        "text": answered.text,
        "finish": answered.finish,
        "num_tokens": answered.num_tokens,
        "error": answered.error,
    }
