"""`sapwood generate`: answer a file of prompts, without a server."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING

import click

from sapwood.app.cli.engine import engine_of, open_llm
from sapwood.app.cli.interrupt import on_interrupt
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS, EngineConfig

if TYPE_CHECKING:
    from sapwood.app.offline.llm import LLM
    from sapwood.frontends.batches.run import Tally

INTERRUPTED = 130
STANDARD_STREAM = "-"


@click.command(cls=ConfigCommand)
@click.argument("source", metavar="INPUT")
@click.option(
    "--output",
    "-o",
    "target",
    required=True,
    metavar="FILE",
    help="Where answers go, one line each, in the order in which they are ready; -: the output.",
)
@click.option(
    "--in-flight",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Lines that are handed to the engine at a time.",
)
@click.option(
    "--retry-errors", is_flag=True, help="Ask the lines again whose answer in FILE is an error."
)
@click.option(
    "--engine",
    type=click.Choice(["process", "ray"]),
    default="process",
    show_default=True,
    help="Where lines are answered: by an engine in this process, or by engines on a Ray cluster.",
)
@click.option(
    "--ray-address",
    metavar="ADDRESS",
    help="Of the cluster for --engine ray (auto: the one of this machine). "
    "Default: one that is started here for this run.",
)
@click.option(
    "--ray-engines",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Engines for --engine ray.",
)
@config_options(*COMPONENTS)
@click.pass_context
def generate(
    ctx: click.Context,
    source: str,
    target: str,
    in_flight: int,
    retry_errors: bool,
    engine: str,
    ray_address: str | None,
    ray_engines: int,
    asked: Asked,
) -> None:
    """Answer each line of INPUT, a file of JSON lines (-: the input).

    A line is {"prompt" or "messages", "sampling_params", "id"}, or one of OpenAI's batch API:
    {"custom_id", "method", "url", "body"}. Run the command again to go on where it was interrupted:
    lines whose id is in FILE already are skipped. A bad line gets an error as its answer, and the
    rest goes on.
    """
    from sapwood.frontends.batches.run import count_lines, resume

    if engine != "ray" and (ray_address is not None or ray_engines != 1):
        raise click.UsageError("--ray-address and --ray-engines are for --engine ray")
    if engine == "ray" and source == STANDARD_STREAM:
        raise click.UsageError("--engine ray reads parts of a file; INPUT cannot be -")
    num_lines = None if source == STANDARD_STREAM else count_lines(_existing(source))
    is_piped = target == STANDARD_STREAM
    if is_piped and retry_errors:
        raise click.UsageError("--retry-errors needs an output that is a file")
    done = set() if is_piped else resume(_writable(target), retry_errors=retry_errors)
    answered = Answered(len(done), num_lines)
    try:
        with ExitStack() as opened:
            answers = _open(target, "ab", sys.stdout.buffer, opened)
            if engine == "ray":
                placed = OnRay(engine_of(asked), ray_address, ray_engines, in_flight)
                is_complete = run_on_ray(
                    placed, Path(source), answers, done=done, answered=answered
                )
            else:
                lines = _open(source, "rb", sys.stdin.buffer, opened)
                llm = opened.enter_context(open_llm(engine_of(asked)))
                is_complete = run(
                    llm, lines, answers, done=done, in_flight=in_flight, answered=answered
                )
    except KeyboardInterrupt:  # before the first line, or for the second time
        is_complete = False
    if not is_complete:
        click.echo(answered.how_to_go_on(target), err=True)
        ctx.exit(INTERRUPTED)


@dataclass(slots=True)
class Answered:
    """How many lines have an answer, from this run and those before; `total` None: unknown."""

    num_lines: int
    total: int | None

    def how_to_go_on(self, target: str) -> str:
        """What an interrupted command says about its answers in the file `target`."""
        of_all = "" if self.total is None else f" of {self.total}"
        if target == STANDARD_STREAM:
            return (
                f"interrupted: {self.num_lines}{of_all} lines were answered; they are not kept. "
                "With --output FILE the same command can be interrupted, and goes on later"
            )
        return (
            f"interrupted: {self.num_lines}{of_all} lines have their answer in {target}; the same "
            "command answers the rest"
        )


def run(
    llm: LLM,
    lines: IO[bytes],
    answers: IO[bytes],
    *,
    done: set[str],
    in_flight: int,
    answered: Answered,
) -> bool:
    """Answer the lines, with a bar and a summary on stderr; False if Ctrl-C ended it."""
    from sapwood.frontends.batches.lines import Reply, to_post
    from sapwood.frontends.batches.run import LineRun, numbered_lines
    from sapwood.frontends.server import create_app
    from sapwood.http.in_process import in_process

    def write(reply: Reply) -> None:
        answers.write(reply.encoded)
        answers.flush()
        answered.num_lines += 1

    services = llm.services

    stopped = False
    start_s = time.monotonic()
    with _bar(answered.total) as show:
        batch = LineRun(
            numbered_lines(lines),
            to_post=lambda line: to_post(line, services),
            post=in_process(create_app(services)),
            why_gone=lambda: services.engine.unavailable_reason,
            done=done,
            write=write,
            in_flight=in_flight,
            on_line=show,
        )

        def stop() -> None:
            nonlocal stopped
            stopped = True
            batch.stop()

        with on_interrupt(stop):
            tally = llm.run(batch.run())
    click.echo(summary(tally, time.monotonic() - start_s), err=True)
    return not stopped


@dataclass(frozen=True, slots=True)
class OnRay:
    """Where `--engine ray` answers lines: `answer_all` explains the fields."""

    config: EngineConfig
    address: str | None
    num_engines: int
    in_flight: int


def run_on_ray(
    placed: OnRay, source: Path, answers: IO[bytes], *, done: set[str], answered: Answered
) -> bool:
    """The same as `run` by engines on a Ray cluster."""
    from sapwood.app.on_ray.batch import answer_all, find_pending

    def write(reply: bytes) -> None:
        answers.write(reply)
        answers.flush()
        answered.num_lines += 1

    stopped = False

    def stop() -> None:
        nonlocal stopped
        stopped = True

    start_s = time.monotonic()
    with _bar(answered.total) as show, on_interrupt(stop):
        tally = answer_all(
            find_pending(source, done),
            source,
            placed.config,
            address=placed.address,
            num_engines=placed.num_engines,
            in_flight=placed.in_flight,
            write=write,
            on_line=show,
            is_stopped=lambda: stopped,
        )
    click.echo(summary(tally, time.monotonic() - start_s), err=True)
    return not stopped


def summary(tally: Tally, seconds: float) -> str:
    rate = tally.num_output_tokens / seconds if seconds > 0 else 0.0
    parts = [f"{tally.num_lines} lines in {seconds:.1f} s"]
    if tally.num_skipped:
        parts.append(f"{tally.num_skipped} were done before")
    parts.append(f"{tally.num_failed} with an error")
    parts.append(f"{tally.num_output_tokens} output tokens, {rate:.1f} tok/s")
    return "; ".join(parts)


@contextmanager
def _bar(total: int | None) -> Iterator[Callable[[Tally], None]]:
    """A function that shows a tally as a bar on stderr; does nothing if that is no terminal."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = (
        TextColumn("lines"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]:.0f} tok/s"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("lines", total=total, rate=0.0)
        start_s = time.monotonic()

        def show(tally: Tally) -> None:
            elapsed_s = max(time.monotonic() - start_s, 1e-9)
            progress.update(
                task,
                completed=tally.num_lines + tally.num_skipped,
                rate=tally.num_output_tokens / elapsed_s,
            )

        yield show


def _existing(source: str) -> Path:
    path = Path(source)
    if not path.is_file():
        raise ConfigError(f"the input {source} is no file; give a file of JSON lines, or -")
    return path


def _writable(target: str) -> Path:
    path = Path(target)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ConfigError(f"the output {target} cannot be written: its directory must exist")
    return path


def _open(name: str, mode: str, standard: IO[bytes], opened: ExitStack) -> IO[bytes]:
    """The file of that name; for "-" the standard stream, which stays open."""
    if name == STANDARD_STREAM:
        return standard
    stream: IO[bytes] = Path(name).open(mode)  # noqa: SIM115 - closed by the caller's stack
    return opened.enter_context(stream)
