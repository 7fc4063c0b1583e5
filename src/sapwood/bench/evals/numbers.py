"""Questions whose answer is a number: GSM8K, MGSM and AIME.

Sources: Cobbe et al. 2021, "Training verifiers to solve math word problems"; Shi et al. 2022,
"Language models are multilingual chain-of-thought reasoners".
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal, InvalidOperation
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.bench.evals.questions import (
    Grade,
    Question,
    column,
    read_lines,
    read_plain_table,
)

_NUMBER = re.compile(r"-?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_ANNOUNCED = re.compile(r"(?:(?i:answer)\b[^\d\n.-]{0,40}|####\s*|\\boxed\{\s*\\?\$?)(-?[\d,.]*\d)")
_HOW = 'Work it out, and end with a line "Answer: N", where N is the number alone.'


def stated_number(text: str) -> str | None:
    """The number that an answer settles on: the last that it announces, else its last number."""
    found = _ANNOUNCED.findall(text) or _NUMBER.findall(text)
    return str(found[-1]) if found else None


def same_number(text: str | None, expected: str) -> bool:
    """Whether two numbers are equal in value: 1,200 and 1200.00 are."""
    value, wanted = _decimal(text), _decimal(expected)
    return value is not None and value == wanted


def _decimal(text: str | None) -> Decimal | None:
    try:
        return None if text is None else Decimal(text.replace(",", ""))
    except InvalidOperation:
        return None


class _Numbers:
    """Grades by the value of the number."""

    def grade(self, question: Question, text: str) -> Grade:
        number = stated_number(text)
        return Grade(score=float(same_number(number, question.expected)), extracted=number)


class Gsm8k(_Numbers):
    """Lines of JSON with "question" and "answer", whose last line is "#### N".

    The first --num-shots questions are shown, with their solutions, before each of the others."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        rows = [
            (path, number, row) for path in paths for number, row in enumerate(read_lines(path))
        ]
        if len(rows) <= num_shots:
            raise ConfigError(
                f"--data has {len(rows)} questions, no more than --num-shots ({num_shots}) shows"
            )
        shown = "".join(
            f"Question: {column(row, 'question', path)}\nAnswer: {column(row, 'answer', path)}\n\n"
            for path, _, row in rows[:num_shots]
        )
        how = "" if num_shots else f"\n{_HOW}"
        return [
            Question(
                name=f"{path.stem}/{number}",
                content=f"{shown}Question: {column(row, 'question', path)}{how}\nAnswer:",
                expected=self._expected(column(row, "answer", path), path),
            )
            for path, number, row in rows[num_shots:]
        ]

    @staticmethod
    def _expected(answer: str, path: Path) -> str:
        number = stated_number(answer.rsplit("####", 1)[-1])
        if number is None:
            raise ConfigError(f"{path}: an answer has no number: {answer[-80:]!r}")
        return number

    def grade(self, question: Question, text: str) -> Grade:
        # A base model goes on with a question of its own.
        return super().grade(question, text.split("\nQuestion:", 1)[0])


class Mgsm(_Numbers):
    """Tab-separated files mgsm_LANGUAGE.tsv, a question and its number per line."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        questions = []
        for path in paths:
            language = path.name.split(".", 1)[0].rpartition("_")[2]
            for number, row in enumerate(read_plain_table(path, delimiter="\t")):
                if len(row) != 2:
                    raise ConfigError(f"{path}, row {number + 1}: a question, a tab, and a number")
                questions.append(
                    Question(
                        name=f"{path.stem}/{number}",
                        content=f"{row[0]}\n\n{_HOW}",
                        expected=row[1].strip(),
                        category=language,
                    )
                )
        return questions


class Aime(_Numbers):
    """Lines of JSON with "question" (or "problem") and "answer", a whole number."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        questions = []
        for path in paths:
            for number, row in enumerate(read_lines(path)):
                name = "question" if "question" in row else "problem"
                questions.append(
                    Question(
                        name=f"{path.stem}/{number}",
                        content=f"{column(row, name, path)}\n\n{_HOW}",
                        expected=column(row, "answer", path),
                    )
                )
        return questions
