"""The task: add two numbers of one digit. Whether an answer is right can be checked."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

SHOWN = "2 + 3 = 5\n"
"""A solved problem, so that a model which was never asked to talk knows what to write."""


@dataclass(frozen=True)
class Problem:
    first: int
    second: int

    @property
    def prompt(self) -> str:
        return f"{SHOWN}{self.first} + {self.second} ="


def draw_problems(generator: random.Random, count: int) -> list[Problem]:
    return [Problem(generator.randint(0, 9), generator.randint(0, 9)) for _ in range(count)]


def reward(problem: Problem, answer: str) -> float:
    """1 for the sum and nothing else in the first line; a tenth for any other number."""
    line = answer.split("\n")[0].strip()
    if not re.fullmatch(r"\d{1,3}", line):
        return 0.0
    return 1.0 if int(line) == problem.first + problem.second else 0.1
