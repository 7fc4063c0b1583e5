"""Questions about pictures: MMMU.

Source: Yue et al. 2024, "MMMU: a massive multi-discipline multimodal understanding and reasoning
benchmark".
"""

from __future__ import annotations

import base64
import mimetypes
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sapwood.base.errors import ConfigError
from sapwood.bench.evals.choices import LETTERS, choice_prompt, chosen_letter
from sapwood.bench.evals.numbers import same_number, stated_number
from sapwood.bench.evals.questions import Grade, Question, column, read_lines

MAX_PICTURE_BYTES = 20 << 20
_MARK = re.compile(r"<image (\d+)>")


class Mmmu:
    """Lines of JSON: "question" (with marks <image 1>, …), "options", "answer", "images".

    images   paths, relative to the file, in the order of the marks
    options  the choices; an empty list makes it an open question, whose answer is a word or number
    """

    def read(self, paths: Sequence[Path], *, num_shots: int, seed: int) -> list[Question]:
        return [
            self._question(row, number, path)
            for path in paths
            for number, row in enumerate(read_lines(path))
        ]

    def _question(self, row: Mapping[str, Any], number: int, path: Path) -> Question:
        options, images = row.get("options") or [], row.get("images") or []
        if not isinstance(options, list) or not isinstance(images, list):
            raise ConfigError(f"{path}, row {number}: options and images are lists")
        if len(options) > len(LETTERS):
            raise ConfigError(f"{path}, row {number}: more than {len(LETTERS)} options")
        text = column(row, "question", path)
        prompt = (
            choice_prompt(text, [str(option) for option in options])
            if options
            else f'{text}\n\nEnd with a line "Answer: X", where X is a word or a number.'
        )
        pictures = [picture_url(path.parent / str(image)) for image in images]
        subject = row.get("subfield") or row.get("subject")
        return Question(
            name=str(row.get("id") or f"{path.stem}/{number}"),
            content=_with_pictures(prompt, pictures),
            expected=column(row, "answer", path).strip(),
            category=None if subject is None else str(subject),
            details={"kind": "choice" if options else "open"},
        )

    def grade(self, question: Question, text: str) -> Grade:
        if question.details["kind"] == "choice":
            letter = chosen_letter(text)
            return Grade(score=float(letter == question.expected), extracted=letter)
        said = text.rpartition("Answer:")[2].strip().rstrip(".")
        right = said.casefold() == question.expected.casefold() or same_number(
            stated_number(text), question.expected
        )
        return Grade(score=float(right), extracted=said)


def picture_url(path: Path) -> str:
    """A file as a data: URL."""
    try:
        size = path.stat().st_size
        if size > MAX_PICTURE_BYTES:
            raise ConfigError(f"{path} has {size} bytes, above {MAX_PICTURE_BYTES}")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"cannot read the picture {path}: {error}") from error
    kind = mimetypes.guess_type(path.name)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _with_pictures(prompt: str, urls: Sequence[str]) -> list[dict[str, Any]]:
    """The prompt's parts: each picture at its mark; pictures without a mark come first."""
    marked = {int(number) for number in _MARK.findall(prompt)}
    parts = [_picture(url) for index, url in enumerate(urls, 1) if index not in marked]
    position = 0
    for mark in _MARK.finditer(prompt):
        index = int(mark[1])
        if not 1 <= index <= len(urls):
            continue
        parts += [_text(prompt[position : mark.start()]), _picture(urls[index - 1])]
        position = mark.end()
    parts.append(_text(prompt[position:]))
    return [part for part in parts if part.get("text") != ""]


def _picture(url: str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": url}}


def _text(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}
