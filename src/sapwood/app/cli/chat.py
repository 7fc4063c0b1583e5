"""`sapwood chat`: talk with a model in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sapwood.app.cli.engine import engine_of, open_llm
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.base.errors import SapwoodError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.options import option
from sapwood.schema.env import environment, home

if TYPE_CHECKING:
    from sapwood.app.cli.chat_backends import ChatBackend
    from sapwood.app.cli.conversation import Conversation

MAX_HISTORY_LINES = 1000
PROMPT = "> "
MORE = "… "


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """What the terminal chat needs beside an engine; None leaves a choice to the model."""

    url: str | None = option(
        None,
        "Talk with this server, which must have OpenAI's API; default: run the model here.",
    )
    api_key: str | None = option(None, "Key for that server; default: none is sent.")
    system: str | None = option(None, "System prompt; default: the chat template's own.")
    temperature: float | None = option(
        None, "Sampling temperature, 0 for greedy; default: the model's."
    )
    top_p: float | None = option(
        None, "Sample from the likeliest tokens of this probability; default: the model's."
    )
    max_new_tokens: int | None = option(
        None, "Tokens of one answer at most; default: what the context leaves.", unit="tokens"
    )
    seed: int | None = option(None, "Same seed, same answer; default: random.")
    verbose: bool = option(False, "Say how fast each answer came.")

    @property
    def sampling(self) -> dict[str, Any]:
        """The sampling parameters that were asked for."""
        names = ("temperature", "top_p", "max_new_tokens", "seed")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


image_option = click.option(
    "--image",
    "pictures",
    multiple=True,
    metavar="FILE",
    help="Show this picture, a file or a URL, with the first message; may be given several times.",
)


@click.command(cls=ConfigCommand)
@click.option(
    "--message",
    "-m",
    "questions",
    multiple=True,
    metavar="TEXT",
    help="Ask this and end; may be given several times, for several turns.",
)
@image_option
@config_options(ChatOptions, *COMPONENTS)
def chat(questions: tuple[str, ...], pictures: tuple[str, ...], asked: Asked) -> None:
    """Talk with a model in the terminal.

    The model runs in this process, or on the server of --url. Ctrl-C stops an answer, Ctrl-D
    leaves, /help lists the commands. If the input is no terminal, all of it is one message; only
    the answer goes to the output.
    """
    converse(asked.build(ChatOptions), asked, questions, pictures)


def converse(
    options: ChatOptions, asked: Asked, questions: Sequence[str], pictures: Sequence[str] = ()
) -> None:
    """Ask the questions, or the input as a whole, or what is typed into a terminal."""
    from sapwood.app.cli.conversation import Conversation

    is_terminal = sys.stdin.isatty()
    if not questions and not is_terminal:
        questions = (_whole_input(),)
    with closing(open_backend(options, asked)) as backend:
        conversation = Conversation(
            backend,
            system=options.system,
            verbose=options.verbose,
            is_terminal=sys.stdout.isatty(),
        )
        conversation.show(pictures)
        for question in questions:
            conversation.ask(question)
        if not questions:
            click.echo(f"{backend.model}; /help lists the commands, Ctrl-D leaves", err=True)
            with _line_editing(home(environment()) / "chat_history"):
                talk(conversation)


def open_backend(options: ChatOptions, asked: Asked) -> ChatBackend:
    """The server of --url, or an engine here."""
    from sapwood.app.cli.chat_backends import InProcess, Remote

    if options.url is None:
        if options.api_key is not None:
            raise click.UsageError("--api-key is for a server; give --url too")
        return InProcess(open_llm(engine_of(asked)), options.sampling)
    useless = [flag for flag in asked.from_command_line(COMPONENTS) if flag != "--model"]
    if useless:
        raise click.UsageError(f"{', '.join(useless)}: the server of --url has its own settings")
    model = asked.given.get("model")
    return Remote(
        options.url,
        model=None if model is None else str(model.value),
        api_key=options.api_key,
        sampling=options.sampling,
    )


def talk(conversation: Conversation) -> None:
    """Read lines and answer them until /quit or the end of the input."""
    from sapwood.app.cli.conversation import Quit

    while True:
        try:
            text = read_message()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            click.echo("\n(Ctrl-D or /quit leaves)", err=True)
            continue
        try:
            if text.startswith("/"):
                conversation.command(text)
            elif text.strip():
                conversation.ask(text)
        except Quit:
            return
        except SapwoodError as error:
            click.echo(f"sapwood: {error.message}", err=True)


def read_message() -> str:
    """A line; one that ends with a backslash goes on with the next."""
    lines = [input(PROMPT)]
    while lines[-1].endswith("\\"):
        lines[-1] = lines[-1][:-1]
        lines.append(input(MORE))
    return "\n".join(lines)


def _whole_input() -> str:
    text = sys.stdin.read().strip()
    if not text:
        raise click.UsageError("the input is empty; write a message to it, or use --message")
    return text


@contextmanager
def _line_editing(history: Path) -> Iterator[None]:
    """Editing of lines, and the lines of earlier chats behind the arrow keys."""
    try:
        import readline
    except ImportError:  # some builds of Python have none: plain input works too
        yield
        return
    readline.set_history_length(MAX_HISTORY_LINES)
    history.parent.mkdir(parents=True, exist_ok=True)
    history.touch(mode=0o600)
    readline.read_history_file(history)
    try:
        yield
    finally:
        readline.write_history_file(history)
