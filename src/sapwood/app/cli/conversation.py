"""A conversation with a model: its messages, one answer at a time, and the commands that begin
with a slash."""

from __future__ import annotations

import base64
import json
import mimetypes
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click

from sapwood.app.cli.chat_backends import ChatBackend, Message, Piece
from sapwood.app.cli.interrupt import on_interrupt
from sapwood.base.clock import Clock, MonotonicClock
from sapwood.base.errors import SapwoodError


class Quit(Exception):
    """The user wants to leave."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """How fast an answer came.

    num_tokens     output tokens
    first_token_s  seconds from the question to the first text
    rest_s         seconds from the first text to the last
    """

    num_tokens: int
    first_token_s: float
    rest_s: float

    def __str__(self) -> str:
        first = f"first after {self.first_token_s:.2f} s"
        if self.num_tokens < 2 or self.rest_s <= 0:
            return f"{self.num_tokens} tokens, {first}"
        return f"{self.num_tokens} tokens, {(self.num_tokens - 1) / self.rest_s:.1f} tok/s, {first}"


class Conversation:
    """The messages so far, and the backend that answers them.

    is_terminal  whether the output is a terminal; then control characters are taken out of answers
    verbose      whether to print on stderr how fast each answer came
    """

    def __init__(
        self,
        backend: ChatBackend,
        *,
        system: str | None = None,
        verbose: bool = False,
        is_terminal: bool = False,
        clock: Clock | None = None,
    ) -> None:
        self._backend = backend
        self._system = system
        self._turns: list[Message] = []
        self._pictures: list[str] = []
        self._verbose = verbose
        self._is_terminal = is_terminal
        self._clock = clock or MonotonicClock()

    @property
    def messages(self) -> list[Message]:
        system = [] if self._system is None else [{"role": "system", "content": self._system}]
        return [*system, *self._turns]

    def show(self, pictures: Sequence[str]) -> None:
        """Let the next question show pictures: files, or http and https URLs.

        Raises SapwoodError if a file cannot be read.
        """
        self._pictures += [_url_of(picture) for picture in pictures]

    def ask(self, text: str) -> None:
        """Print the answer as it comes, and keep question and answer. Ctrl-C cuts the answer off.

        Raises SapwoodError if there is no answer, or only the beginning of one. Then the question
        is dropped from the conversation, so that the user can repeat it.
        """
        question: Message = {"role": "user", "content": self._content(text)}
        answer = self._print_answer([*self.messages, question])
        if answer:
            self._turns += [question, {"role": "assistant", "content": answer}]
            self._pictures.clear()

    def _content(self, text: str) -> str | list[dict[str, Any]]:
        shown: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": url}} for url in self._pictures
        ]
        return [*shown, {"type": "text", "text": text}] if shown else text

    def _print_answer(self, messages: list[Message]) -> str:
        parts: list[str] = []
        stopped = False

        def stop() -> None:
            nonlocal stopped
            stopped = True

        timer = _Timer(self._clock)
        pieces = self._backend.answer(messages)
        try:
            with on_interrupt(stop), closing(pieces):
                for piece in pieces:
                    timer.note(piece)
                    self._show(piece)
                    if not piece.is_reasoning:
                        parts.append(piece.text)
                    if stopped:
                        break
        except KeyboardInterrupt:
            stopped = True
        finally:
            if parts or stopped:
                click.echo()
        if stopped:
            click.echo("(stopped)", err=True)
        if self._verbose:
            click.echo(f"[{timer.speed}]", err=True)
        return "".join(parts)

    def _show(self, piece: Piece) -> None:
        text = without_controls(piece.text) if self._is_terminal else piece.text
        if not text:
            return
        if not piece.is_reasoning:
            click.echo(text, nl=False, color=True)  # as it is: click would strip escapes
        elif self._is_terminal:
            click.secho(text, nl=False, dim=True)

    def command(self, line: str) -> None:
        """Carry out a line that begins with a slash; Quit leaves, SapwoodError says what failed."""
        name, _, argument = line.partition(" ")
        found = COMMANDS.get(name)
        if found is None:
            known = ", ".join(COMMANDS)
            raise SapwoodError(f"there is no command {name}; there are {known}")
        found.run(self, argument.strip())

    def show_help(self, _: str) -> None:
        for name, found in COMMANDS.items():
            click.echo(f"{name} {found.argument}".ljust(16) + found.help)
        click.echo("A backslash at the end of a line goes on with the next one.")
        click.echo("Ctrl-C stops an answer; Ctrl-D leaves.")

    def clear(self, _: str) -> None:
        self._turns.clear()
        self._pictures.clear()
        click.echo("(forgotten; the system prompt stays)", err=True)

    def set_system(self, text: str) -> None:
        if text:
            self._system = text
        click.echo(self._system or "(no system prompt)")

    def attach(self, picture: str) -> None:
        if not picture:
            raise SapwoodError("say which: /image FILE")
        self.show([picture])
        click.echo(f"(the next question shows {len(self._pictures)})", err=True)

    def save(self, path: str) -> None:
        if not path:
            raise SapwoodError("say where to: /save FILE")
        target = Path(path).expanduser()
        content = {"model": self._backend.model, "messages": self.messages}
        try:
            target.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        except OSError as error:
            raise SapwoodError(f"cannot write {target}: {error}") from error
        click.echo(f"(wrote {len(self.messages)} messages to {target})", err=True)

    def leave(self, _: str) -> None:
        raise Quit


@dataclass(frozen=True, slots=True)
class Command:
    run: Callable[[Conversation, str], None]
    argument: str
    help: str


COMMANDS: Mapping[str, Command] = {
    "/help": Command(Conversation.show_help, "", "show this"),
    "/clear": Command(Conversation.clear, "", "forget what was said"),
    "/system": Command(Conversation.set_system, "[TEXT]", "set or show the system prompt"),
    "/image": Command(Conversation.attach, "FILE", "show a picture with the next question"),
    "/save": Command(Conversation.save, "FILE", "write the conversation to a file, as JSON"),
    "/quit": Command(Conversation.leave, "", "leave"),
}


def _url_of(picture: str) -> str:
    if picture.lower().startswith(("http://", "https://", "data:")):
        return picture
    try:
        data = Path(picture).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        raise SapwoodError(f"the picture {picture} cannot be read: {error}") from error
    # What it really is, the server finds out.
    kind = mimetypes.guess_type(picture)[0] or "application/octet-stream"
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def without_controls(text: str) -> str:
    """The text without characters that control a terminal, such as escape sequences."""
    return "".join(c for c in text if c in "\n\t" or unicodedata.category(c) != "Cc")


class _Timer:
    """Measures when text came and how many tokens there were."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._start_s = clock.now_s()
        self._first_s: float | None = None
        self._last_s = self._start_s
        self._num_pieces = 0
        self._num_tokens: int | None = None

    def note(self, piece: Piece) -> None:
        if piece.num_output_tokens is not None:
            self._num_tokens = piece.num_output_tokens
        if not piece.text:
            return
        self._num_pieces += 1
        self._last_s = self._clock.now_s()
        if self._first_s is None:
            self._first_s = self._last_s

    @property
    def speed(self) -> Speed:
        first_s = self._last_s if self._first_s is None else self._first_s
        return Speed(
            # If the server does not count tokens, each piece counts as one.
            num_tokens=self._num_pieces if self._num_tokens is None else self._num_tokens,
            first_token_s=first_s - self._start_s,
            rest_s=self._last_s - first_s,
        )
