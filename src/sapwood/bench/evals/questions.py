"""The questions of an evaluation: what is asked, and which answer is right."""

from __future__ import annotations

import csv
import gzip
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from sapwood.base.errors import ConfigError

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """One question of a data set.

    name      tells it from the others of its file, in every run
    content   of the user's message: a text, or OpenAI's parts of texts and pictures
    expected  what the grader of its task compares an answer with
    category  the subject or language whose own score is shown
    """

    name: str
    content: str | list[dict[str, Any]]
    expected: str
    category: str | None = None
    details: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grade:
    """0 to 1 for one answer, and what was taken from its text as the answer."""

    score: float
    extracted: str | None


class Task(Protocol):
    """An evaluation by name: reads its files and grades answers."""

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        """All questions of the files, in their order. ConfigError: a file is not of this task."""
        ...

    def grade(self, question: Question, text: str) -> Grade:
        """May be called from several threads at a time."""
        ...


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file with a JSON object per line, packed with gzip or not."""
    text = _text(path)
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"{path}, line {number}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise ConfigError(f"{path}, line {number}: a JSON object is expected")
        yield row


def read_table(path: Path, *, delimiter: str = ",") -> Iterator[dict[str, str]]:
    """The rows of a file of comma-separated values whose first line names the columns."""
    for row in csv.DictReader(_text(path).splitlines(keepends=True), delimiter=delimiter):
        yield {name: value or "" for name, value in row.items() if name is not None}


def read_plain_table(path: Path, *, delimiter: str) -> Iterator[list[str]]:
    """The rows of a file of separated values without a line of names."""
    yield from csv.reader(_text(path).splitlines(keepends=True), delimiter=delimiter)


def column(row: Mapping[str, Any], name: str, path: Path) -> str:
    """A value that every row must have; ConfigError names the file, the column, and what it has."""
    value = row.get(name)
    if value is None or value == "":
        raise ConfigError(f"{path}: no {name!r} in a row; it has {', '.join(map(repr, row))}")
    return str(value)


def _text(path: Path) -> str:
    try:
        if path.suffix == ".gz":
            with gzip.open(path, "rt", encoding="utf-8") as file:
                return file.read()
        return path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError(f"cannot read --data {path}: {error}") from error
