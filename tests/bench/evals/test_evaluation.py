"""`sapwood bench eval` against a server that knows some answers."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from sapwood.base.errors import ConfigError
from sapwood.bench.cli import bench

Replies = Callable[[str, dict[str, Any]], Any]
Serve = Callable[[Replies], Any]


@pytest.fixture
def answering(fake: Any) -> Callable[[Callable[[int], bool]], Replies]:
    """Replies whose answer to "What is N plus N?" is right where N is known."""
    Reply = fake.Reply

    def reply(knows: Callable[[int], bool], path: str, body: dict[str, Any]) -> Any:
        if path == "/v1/models":
            return Reply(body={"data": [{"id": "oak"}]})
        number = int(body["messages"][0]["content"].split("What is ")[1].split(" ", 1)[0])
        if number == 7:
            return Reply(status=500, body={"error": {"message": "out of sap"}})
        letter = "B" if knows(number) else "C"
        text = f"<think>The answer is D, or not.</think>Answer: {letter}"
        choice = {"message": {"content": text}, "finish_reason": "stop"}
        return Reply(body={"choices": [choice], "usage": {"completion_tokens": 9}})

    return lambda knows: partial(reply, knows)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "sums.csv"
    subjects = ("even", "odd")
    rows = [f"What is {n} plus {n}?,1,{2 * n},3,4,B,{subjects[n % 2]}\n" for n in range(10, 50)]
    path.write_text("Question,A,B,C,D,Answer,Subject\n" + "".join(rows))
    return path


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Callable[..., Result]:
    def run(*arguments: str) -> Result:
        command = ["eval", "--data", str(data), "--output-dir", str(tmp_path / "out"), *arguments]
        return CliRunner(env={"COLUMNS": "160"}).invoke(bench, command)

    return run


def report(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    (path,) = (tmp_path / "out").glob("eval-mmlu-*.json")
    kept = path.rename(tmp_path / "earlier.json")
    return kept, json.loads(kept.read_text())


def test_scores_by_subject_and_sampling_as_asked(
    serve: Serve, answering: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    server = serve(answering(lambda number: number % 2 == 0))
    result = run(
        *("--url", server.url, "--api-key", "leaf", "--num-threads", "4", "--max-tokens", "77"),
        *("--temperature", "0.5", "--top-p", "0.9", "--top-k", "20", "--seed", "3"),
        *("--thinking", "off", "--reasoning-effort", "low"),
    )
    assert result.exit_code == 0, result.output
    assert "0.352 to 0.648" in result.output
    assert server.most_open <= 4
    assert any("authorization: Bearer leaf" in head for head in server.headers)
    (body,) = {json.dumps(b | {"messages": 0}) for b in server.bodies("/v1/chat/completions")}
    assert json.loads(body) == {
        "model": "oak",
        "messages": 0,
        "max_tokens": 77,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 20,
        "seed": 3,
        "reasoning_effort": "low",
        "chat_template_kwargs": {"enable_thinking": False, "thinking": False},
    }
    _, found = report(tmp_path)
    (of_server,) = found["servers"]
    assert of_server["score"] == 0.5
    assert "api_key" not in found["options"]
    wrong = next(answer for answer in of_server["answers"] if answer["question"] == "sums/1")
    assert (wrong["expected"], wrong["extracted"], wrong["category"]) == ("B", "C", "odd")


def test_two_servers_and_an_earlier_run_are_compared(
    serve: Serve, answering: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    good, bad = serve(answering(lambda number: number < 45)), serve(answering(lambda n: n < 25))
    result = run("--url", good.url, "--baseline-url", bad.url)
    assert result.exit_code == 0, result.output
    assert "on 40 questions: 0.500 [0.343 to 0.657], 20 better and 0 worse" in result.output
    assert "chance" not in result.output
    earlier, _ = report(tmp_path)
    again = run("--url", good.url, "--compare-with", str(earlier), "--num-examples", "12")
    assert "on 12 questions: 0.000 [0.000 to 0.000], 0 better and 0 worse" in again.output
    assert "this may be chance" in again.output
    other = run("--url", good.url, "--compare-with", str(tmp_path / "sums.csv"))
    assert isinstance(other.exception, ConfigError)
    assert "cannot be read" in str(other.exception)


def test_a_question_without_an_answer_counts_as_wrong_and_is_told(
    serve: Serve, answering: Any, run: Callable[..., Result], tmp_path: Path
) -> None:
    path = tmp_path / "sums.csv"
    path.write_text(
        "Question,A,B,C,D,Answer\n" + "".join(f"What is {n} plus?,1,2,3,4,B\n" for n in (6, 7))
    )
    result = run("--url", serve(answering(lambda _: True)).url, "--repeat", "2")
    assert result.exit_code == 1
    assert "sums/1: HTTP 500: out of sap" in result.output
    _, found = report(tmp_path)
    assert found["servers"][0]["scores"] == {"sums/0": 1.0, "sums/1": 0.0}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--eval-name", "humaneval"), "ask for that with --run-programs"),
        (("--eval-name", "nothing"), "unknown evaluation 'nothing'; known: aime25, gpqa"),
        (("--repeat", "0"), "--repeat is 0"),
        (("--url", "ftp://x"), "ftp"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    run: Callable[..., Result], arguments: tuple[str, ...], message: str
) -> None:
    result = run(*arguments)
    assert isinstance(result.exception, ConfigError)
    assert message in str(result.exception)


def test_files_are_asked_for(run: Callable[..., Result]) -> None:
    result = CliRunner().invoke(bench, ["eval"])
    assert isinstance(result.exception, ConfigError)
    assert "sapwood brings no questions" in str(result.exception)
