"""Questions whose answer is a letter: MMLU and GPQA.

Sources: Hendrycks et al. 2021, "Measuring massive multitask language understanding"; Rein et al.
2023, "GPQA: a graduate-level Google-proof Q&A benchmark".
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.bench.evals.questions import Grade, Question, column, read_table

LETTERS = "ABCDEFGHIJ"
_ANNOUNCED = re.compile(
    r"\banswer\b(?: is)?[\s:=*_$(\[{\"'`]*(?:\\(?:text|mathbf|boxed)\{)?\(?([A-J])\b(?!')"
)
_BOXED = re.compile(r"\\boxed\{\s*(?:\\text\{)?\s*\(?([A-J])\b")
_ALONE = re.compile(r"^[\s*_(\"'`$]*([A-J])[\s*_)\"'`$.:]*$", re.MULTILINE)
_LEADING = re.compile(r"\A[\s*(]*([A-J])[).:]")


def chosen_letter(text: str) -> str | None:
    """The letter that an answer settles on.

    It is the last in a box, else the last announced, else the last alone on a line, else the one
    that begins the text ("B) because …")."""
    # The word "answer" in any case, but letters only in capitals: "the answer is a matter of …".
    lowered = re.sub(r"(?i)\banswer\b", "answer", text)
    for pattern in (_BOXED, _ANNOUNCED, _ALONE, _LEADING):
        found = pattern.findall(lowered)
        if found:
            return str(found[-1])
    return None


def choice_prompt(question: str, choices: Sequence[str]) -> str:
    """The question with its lettered choices, and how to answer it."""
    listed = "\n".join(f"{LETTERS[i]}) {choice}" for i, choice in enumerate(choices))
    last = LETTERS[len(choices) - 1]
    return (
        f"Choose the right answer to this question. Think first if you need to, and end with a "
        f'line "Answer: X", where X is a letter from A to {last}.\n\n{question}\n\n{listed}'
    )


class _Choices:
    """Grades by the letter."""

    def grade(self, question: Question, text: str) -> Grade:
        letter = chosen_letter(text)
        return Grade(score=float(letter == question.expected), extracted=letter)


class Mmlu(_Choices):
    """CSV files with the columns Question, A, B, C, D, Answer and, if there is one, Subject."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        questions = []
        for path in paths:
            for number, row in enumerate(read_table(path)):
                answer = column(row, "Answer", path).strip().upper()
                if answer not in LETTERS[:4]:
                    raise ConfigError(f"{path}: row {number}: Answer is {answer!r}, not A to D")
                choices = [column(row, letter, path) for letter in LETTERS[:4]]
                questions.append(
                    Question(
                        name=f"{path.stem}/{number}",
                        content=choice_prompt(column(row, "Question", path), choices),
                        expected=answer,
                        category=row.get("Subject") or None,
                    )
                )
        return questions


class Gpqa(_Choices):
    """CSV files with the columns Question, Correct Answer and Incorrect Answer 1 to 3.

    The order of the four choices is drawn with the seed, for each question its own."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        questions = []
        for path in paths:
            for number, row in enumerate(read_table(path)):
                name = f"{path.stem}/{number}"
                right = column(row, "Correct Answer", path)
                wrong = [column(row, f"Incorrect Answer {i}", path) for i in (1, 2, 3)]
                order = random.Random(f"{seed}/{name}").sample(range(4), 4)
                choices = [[right, *wrong][i].strip() for i in order]
                questions.append(
                    Question(
                        name=name,
                        content=choice_prompt(column(row, "Question", path), choices),
                        expected=LETTERS[order.index(0)],
                        category=row.get("High-level domain") or None,
                    )
                )
        return questions
