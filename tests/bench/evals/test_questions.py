"""What the evaluations read from their files, and how they read answers."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from sapwood.base.errors import ConfigError
from sapwood.bench.evals.choices import Gpqa, Mmlu, chosen_letter
from sapwood.bench.evals.numbers import Aime, Gsm8k, Mgsm, same_number, stated_number
from sapwood.bench.evals.pictures import Mmmu
from sapwood.bench.evals.programs import HumanEval, passes, program_of
from sapwood.bench.evals.tasks import EVALS

Write = Callable[[str, str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(name: str, text: str) -> Path:
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("Answer: B", "B"),
        ("**Answer:** (C)", "C"),
        ("I first thought the answer is A.\nBut no.\nanswer: D", "D"),
        (r"So the result is \boxed{\text{B}}", "B"),
        (r"Answer: $\text{C}$", "C"),
        ("B", "B"),
        ("(D).", "D"),
        ("The answer is B because water is wet.", "B"),
        ("A) 1", "A"),
        ("An answer is a matter of taste.", None),
        ("ABBA", None),
        ("", None),
    ],
)
def test_the_letter_that_an_answer_settles_on(text: str, letter: str | None) -> None:
    assert chosen_letter(text) == letter


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 and 4 make 7.", "7"),
        ("Answer: 1,200 apples, of which 3 are red", "1,200"),
        (r"\boxed{-42}", "-42"),
        ("so\n#### 18", "18"),
        ("The answer is $5.50.", "5.50"),
        ("none", None),
    ],
)
def test_the_number_that_an_answer_settles_on(text: str, number: str | None) -> None:
    assert stated_number(text) == number


def test_numbers_are_compared_by_value() -> None:
    assert same_number("1,200.00", "1200")
    assert not same_number("1201", "1200")
    assert not same_number(None, "1200")


def test_mmlu(write: Write) -> None:
    path = write(
        "mmlu.csv",
        ',Question,A,B,C,D,Answer,Subject\n0,"What is 1, plus 1?",1,2,3,4,B,arithmetic\n',
    )
    (question,) = Mmlu().read([path], num_shots=0, seed=0)
    assert isinstance(question.content, str)
    assert "What is 1, plus 1?\n\nA) 1\nB) 2\nC) 3\nD) 4" in question.content
    assert question.category == "arithmetic"
    assert Mmlu().grade(question, "Answer: B").score == 1
    assert Mmlu().grade(question, "Answer: C").score == 0
    assert Mmlu().grade(question, "I do not know").extracted is None


def test_a_file_of_another_form_is_refused_by_its_columns(write: Write) -> None:
    path = write("mmlu.csv", "q,a\nx,y\n")
    with pytest.raises(ConfigError, match=r"no 'Answer' in a row; it has 'q', 'a'"):
        Mmlu().read([path], num_shots=0, seed=0)
    lines = write("lines.jsonl", '{"question": "x", "answer": 1}\nnot JSON\n')
    with pytest.raises(ConfigError, match=r"line 2: not JSON"):
        Aime().read([lines], num_shots=0, seed=0)
    with pytest.raises(ConfigError, match="cannot read --data"):
        Aime().read([lines.with_name("none")], num_shots=0, seed=0)


def test_gpqa_draws_the_order_of_its_choices_with_the_seed(write: Write) -> None:
    rows = "".join(f"q{i},right,w1,w2,w3\n" for i in range(40))
    header = "Question,Correct Answer,Incorrect Answer 1,Incorrect Answer 2,Incorrect Answer 3\n"
    path = write("gpqa.csv", header + rows)
    questions = Gpqa().read([path], num_shots=0, seed=3)
    assert questions == Gpqa().read([path], num_shots=0, seed=3)
    assert questions != Gpqa().read([path], num_shots=0, seed=4)
    assert {question.expected for question in questions} == set("ABCD")
    assert all(f"{question.expected}) right" in question.content for question in questions)


def test_gsm8k_shows_the_first_questions_before_the_others(write: Write) -> None:
    rows = [{"question": f"q{i}", "answer": f"because\n#### 1,00{i}"} for i in range(4)]
    path = write("gsm8k.jsonl", "\n".join(map(json.dumps, rows)))
    task = Gsm8k()
    questions = task.read([path], num_shots=2, seed=0)
    assert [question.name for question in questions] == ["gsm8k/2", "gsm8k/3"]
    assert questions[0].content == (
        "Question: q0\nAnswer: because\n#### 1,000\n\n"
        "Question: q1\nAnswer: because\n#### 1,001\n\nQuestion: q2\nAnswer:"
    )
    assert task.grade(questions[0], "so 1002").score == 1
    assert task.grade(questions[0], "so 1002\nQuestion: what is 7?\nAnswer: 7").score == 1
    assert task.grade(questions[0], "1003").score == 0
    with pytest.raises(ConfigError, match="no more than --num-shots"):
        task.read([path], num_shots=4, seed=0)


def test_mgsm_scores_by_language(write: Write) -> None:
    path = write("mgsm_de.tsv", "Wie viel ist 2 mal 3?\t6\n")
    (question,) = Mgsm().read([path], num_shots=0, seed=0)
    assert question.category == "de"
    assert Mgsm().grade(question, "Answer: 6").score == 1


PROBLEM = {
    "task_id": "T/0",
    "prompt": 'import math\n\ndef double(x):\n    """Twice x."""\n',
    "entry_point": "double",
    "test": "def check(candidate):\n    assert candidate(4) == 8\n",
}


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("    return 2 * x\n", 1),
        ("Sure!\n```python\ndef double(x):\n    return math.floor(2 * x)\n```\nDone.", 1),
        ("def double(x):\n    return x", 0),
        ("import sys\nsys.exit(0)\ndef double(x):\n    return 2 * x", 1),
        ("```python\nimport sys\nsys.exit(0)\ndef double(x):\n    return 2 * x\n```", 0),
        ("    return [0] * 10**12", 0),
        ("I cannot do that.", 0),
    ],
)
def test_a_program_must_run_to_its_end(tmp_path: Path, text: str, score: float) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    with gzip.open(path, "wt") as file:
        file.write(json.dumps(PROBLEM))
    task = HumanEval()
    (question,) = task.read([path], num_shots=0, seed=0)
    assert task.grade(question, text).score == score


def test_a_program_that_does_not_end_is_ended_with_its_children(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sapwood.bench.evals.programs.TIMEOUT_S", 0.5)
    start = time.monotonic()
    assert not passes("import subprocess, sys\nsubprocess.run(['sleep', '60'])")
    assert time.monotonic() - start < 30


def test_the_prompts_helpers_stay_when_the_function_is_given_anew() -> None:
    program = program_of(
        "```python\ndef f():\n    return g()\n```", "def g(): ...\ndef f():\n", "f"
    )
    assert program == "def g(): ...\n\ndef f():\n    return g()\n"


def test_mmmu_puts_pictures_at_their_marks(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2)).save(tmp_path / "a.png")
    rows = [
        {
            "id": "art-1",
            "question": "What does <image 1> show?",
            "options": ["red", "black"],
            "answer": "B",
            "images": ["a.png"],
            "subfield": "art",
        },
        {"question": "How many?", "options": [], "answer": "4", "images": ["a.png"]},
    ]
    path = tmp_path / "mmmu.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    choice, open_ended = Mmmu().read([path], num_shots=0, seed=0)
    assert [part["type"] for part in choice.content] == ["text", "image_url", "text"]
    assert [part["type"] for part in open_ended.content] == ["image_url", "text"]
    assert (choice.name, choice.category) == ("art-1", "art")
    assert Mmmu().grade(choice, "Answer: B").score == 1
    assert Mmmu().grade(open_ended, "I count them.\nAnswer: 4.").score == 1
    assert Mmmu().grade(open_ended, "Answer: 5").score == 0
    path.write_text(json.dumps(rows[0] | {"images": ["none.png"]}))
    with pytest.raises(ConfigError, match="cannot read the picture"):
        Mmmu().read([path], num_shots=0, seed=0)


def test_every_name_has_an_evaluation() -> None:
    for name in EVALS.names():
        assert callable(EVALS.get(name)().read)
