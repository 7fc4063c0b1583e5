"""`sapwood bench`: measure a server, an engine in this process, or sapwood beside its peers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from sapwood.app.cli.engine import engine_of
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.bench import commands
from sapwood.bench.conversations import Conversations, ConversationsOptions, known_table
from sapwood.bench.environment import describe_environment
from sapwood.bench.evals.options import EvalOptions, PerplexityOptions
from sapwood.bench.gpu.options import GpuOptions
from sapwood.bench.offline import OfflineOptions
from sapwood.bench.ops.options import OpsOptions
from sapwood.bench.peers.compare import PeersOptions
from sapwood.bench.random_model.options import RandomModelOptions
from sapwood.bench.ranks.options import RanksOptions
from sapwood.bench.report import OutputOptions
from sapwood.bench.scheduler import SchedulerOptions, cost_table, measure_growth
from sapwood.bench.serving import ServingOptions
from sapwood.bench.soak import Soak, SoakOptions
from sapwood.bench.workloads.presets import WorkloadOptions
from sapwood.bench.workloads.vocabulary import read_vocabulary
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.env import environment, home
from sapwood.store import fetch_model
from sapwood.store.terminal import TerminalProgress


@click.group()
def bench() -> None:
    """Measure speed: of a server, of this machine, and beside what else there is."""


@bench.command(cls=ConfigCommand)
@config_options(ServingOptions, WorkloadOptions, OutputOptions)
@click.pass_context
def serve(ctx: click.Context, asked: Asked) -> None:
    """Measure a running server: latencies and throughput under load.

    Works with any server that speaks OpenAI's completions or chat API, or the native /generate.
    Exits with 1 if a request failed.
    """
    completed = commands.bench_serving(
        asked.build(ServingOptions),
        asked.build(WorkloadOptions),
        asked.build(OutputOptions),
        Console(),
    )
    ctx.exit(0 if completed else 1)


@bench.command(cls=ConfigCommand)
@config_options(OfflineOptions, WorkloadOptions, OutputOptions, *COMPONENTS)
def offline(asked: Asked) -> None:
    """Measure throughput without a server, in this process."""
    from sapwood.bench.sapwood_generator import open_llm

    # Built first: a contradiction must not show only after the model has been loaded.
    options, workload = asked.build(OfflineOptions), asked.build(WorkloadOptions)
    output, config = asked.build(OutputOptions), engine_of(asked)
    console = Console()
    files = fetch_model(
        config.model.model,
        home=home(environment()),
        revision=config.model.revision,
        load_format=config.model.load_format,
        offline=config.model.offline,
        checksum=config.model.model_checksum,
        progress=TerminalProgress(console),
    )
    tokenizer = config.model.tokenizer_path
    vocabulary = read_vocabulary(Path(tokenizer).expanduser() if tokenizer else files.path)
    with open_llm(config) as generator:
        commands.bench_offline(
            generator, vocabulary, options, workload, output, console, {"engine": asdict(config)}
        )


@bench.command(cls=ConfigCommand)
@config_options(SchedulerOptions)
def scheduler(asked: Asked) -> None:
    """Measure what a step's scheduling and bookkeeping cost, with no model behind them."""
    costs = measure_growth(asked.build(SchedulerOptions))
    console = Console()
    console.print(str(describe_environment()))
    console.print(cost_table(costs))


@bench.command(cls=ConfigCommand)
@config_options(OpsOptions, OutputOptions)
def ops(asked: Asked) -> None:
    """Measure every op alone: beside torch, and beside what memory and processor allow."""
    from sapwood.bench.ops.measure import bench_ops

    bench_ops(asked.build(OpsOptions), asked.build(OutputOptions), Console())


@bench.command(cls=ConfigCommand)
@config_options(RanksOptions, OutputOptions)
def ranks(asked: Asked) -> None:
    """Measure what ranks of this machine send each other: sums, and rows for experts."""
    from sapwood.bench.ranks.command import bench_ranks

    bench_ranks(asked.build(RanksOptions), asked.build(OutputOptions), Console())


@bench.command(cls=ConfigCommand)
@config_options(GpuOptions, OutputOptions)
@click.pass_context
def gpu(ctx: click.Context, asked: Asked) -> None:
    """Check every kernel on a GPU, and measure how near its limits steps come.

    Takes up to 8 minutes. Exits with 1 if a kernel's results are not the reference's.
    """
    from sapwood.bench.gpu.command import bench_gpu

    passed = bench_gpu(asked.build(GpuOptions), asked.build(OutputOptions), Console())
    ctx.exit(0 if passed else 1)


@bench.command(cls=ConfigCommand)
@config_options(ConversationsOptions)
def conversations(asked: Asked) -> None:
    """Measure how much of growing conversations the engines behind a gateway still know."""
    import uvloop

    options = asked.build(ConversationsOptions)
    known = uvloop.run(Conversations(options).run())
    console = Console()
    console.print(str(describe_environment()))
    console.print(known_table(options, known))


@bench.command(cls=ConfigCommand)
@config_options(SoakOptions)
@click.pass_context
def soak(ctx: click.Context, asked: Asked) -> None:
    """Keep a running server busy with everything at once, and look for what leaks or breaks.

    Exits with 1 if pages or memory were lost, a request failed, or the counters do not add up.
    """
    import uvloop

    options = asked.build(SoakOptions)
    console = Console()
    report = uvloop.run(Soak(options).run())
    for line in report.lines():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    for problem in report.problems:
        console.print(f"problem: {problem}", style="red", markup=False, soft_wrap=True)
    if not report.problems:
        console.print("nothing leaked, broke or got lost", markup=False)
    ctx.exit(1 if report.problems else 0)


@bench.command(cls=ConfigCommand)
@config_options(PerplexityOptions, *COMPONENTS)
def perplexity(asked: Asked) -> None:
    """Measure how well a model, as it is served, predicts a text: what quantisation costs."""
    from sapwood.bench.evals.command import bench_perplexity

    options, config = asked.build(PerplexityOptions), engine_of(asked)
    console = Console()
    progress = TerminalProgress(console)
    bench_perplexity(config, options, console, home=home(environment()), progress=progress)


@bench.command("eval", cls=ConfigCommand)
@config_options(EvalOptions)
@click.pass_context
def evaluate(ctx: click.Context, asked: Asked) -> None:
    """Ask a running server the questions of a known evaluation, and score its answers.

    The questions are your files. With --baseline-url or --compare-with the difference is shown with
    its 95% interval. Exits with 1 if a question got no answer.
    """
    from sapwood.bench.evals.evaluation import bench_eval

    console = Console()
    answered = bench_eval(asked.build(EvalOptions), console, TerminalProgress(console))
    ctx.exit(0 if answered else 1)


@bench.command("random-model", cls=ConfigCommand)
@config_options(RandomModelOptions)
def random_model(asked: Asked) -> None:
    """Write a checkpoint with random weights, and a GGUF file of it, to compare peers with."""
    from sapwood.bench.random_model.command import make_random_model

    console = Console()
    make_random_model(
        asked.build(RandomModelOptions),
        console,
        home=home(environment()),
        progress=TerminalProgress(console),
    )


@bench.command(cls=ConfigCommand)
@config_options(PeersOptions, OutputOptions)
def peers(asked: Asked) -> None:
    """Compare sapwood with what else serves the model, on the same prompts and in turn.

    Each peer has its model loaded in a process of its own, and only one runs at a time.
    """
    from sapwood.bench.peers.conversion import checkpoint_directory
    from sapwood.bench.peers.interface import PeerSetup
    from sapwood.bench.peers.process import PeerProcess, child_command
    from sapwood.bench.peers.spec import peer_specs

    options, output = asked.build(PeersOptions), asked.build(OutputOptions)
    specs = peer_specs(options.peer_names, Path(options.peers_file) if options.peers_file else None)
    console = Console()
    env = environment()
    progress = TerminalProgress(console)
    files = fetch_model(options.model, home=home(env), offline=options.offline, progress=progress)
    directory = checkpoint_directory(
        files, home=home(env), dtype=options.dtype, env=env, progress=progress
    )
    with ExitStack() as stack:
        loaded = []
        for name, spec in specs.items():
            console.print(f"starting {name}")
            process = PeerProcess(
                name,
                PeerSetup(
                    model_dir=spec.model or str(directory),
                    dtype=options.dtype,
                    num_threads=options.num_threads,
                    options=spec.options,
                ),
                kind=spec.kind,
                timeout_s=options.peer_timeout,
                env=env,
                command=child_command(spec.python),
            )
            loaded.append(stack.enter_context(process))
        vocabulary = read_vocabulary(directory)
        commands.bench_peers(loaded, vocabulary, options, output, console)
