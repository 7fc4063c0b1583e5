"""The commands of `sapwood bench`, after their options are parsed: measure, show, write."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path

import uvloop
from rich.console import Console

from sapwood.base.errors import ConfigError, StartupError
from sapwood.bench.environment import Environment, describe_environment
from sapwood.bench.offline import (
    OfflineOptions,
    OfflineResult,
    Repeat,
    TokenGenerator,
    in_process,
    measure_workload,
)
from sapwood.bench.peers.compare import Comparison, Peer, PeersOptions, compare
from sapwood.bench.report import (
    OutputOptions,
    comparison_table,
    latency_table,
    offline_json,
    offline_table,
    options_json,
    peer_table,
    report_stem,
    serving_json,
    serving_remarks,
    totals_table,
    write_json,
)
from sapwood.bench.serving import (
    Load,
    ServingOptions,
    ServingRun,
    Target,
    connect,
    first_model,
    run_workload,
    server_vocabulary,
    warm_up,
)
from sapwood.bench.workloads.presets import WorkloadOptions
from sapwood.bench.workloads.vocabulary import (
    WORDS,
    TokenVocabulary,
    Vocabulary,
    WordVocabulary,
    read_vocabulary,
)
from sapwood.bench.workloads.workload import BenchRequest, WorkloadSpec
from sapwood.schema import env
from sapwood.store import fetch_model


def bench_serving(
    serving: ServingOptions, workload: WorkloadOptions, output: OutputOptions, console: Console
) -> bool:
    """Measure a server on each named workload; False if any request failed."""
    environment = describe_environment()
    # uvloop nearly halves the client's cost, which matters if the server is on the same machine.
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_bench_serving(serving, workload, output, console, environment))


async def _bench_serving(
    serving: ServingOptions,
    workload: WorkloadOptions,
    output: OutputOptions,
    console: Console,
    environment: Environment,
) -> bool:
    target = await connect(serving)
    vocabulary = await _serving_vocabulary(serving, target)
    load = Load(
        rate=serving.request_rate, max_concurrency=serving.max_concurrency, seed=workload.seed
    )
    all_completed = True
    for spec in workload.specs():
        _show_workload(spec, console)
        seed = workload.seed
        await warm_up(target, warm_up_requests(spec, vocabulary, serving.num_warmups, seed=seed))
        run = await run_workload(target, spec.generate(vocabulary, seed=seed), load)
        options = options_json(serving, workload, output) | {"model": target.asked.model}
        _show_serving(run, environment, options, output, console, str(target.endpoint))
        all_completed = all_completed and run.metrics.num_failed == 0
    return all_completed


async def _serving_vocabulary(serving: ServingOptions, target: Target) -> Vocabulary:
    if serving.prompts_as_text:
        return WordVocabulary(WORDS)
    if not target.dialect().takes_token_ids:
        raise ConfigError(f"--api {serving.api} takes no token ids; use --prompts text")
    if serving.tokenizer is not None:
        return model_vocabulary(serving.tokenizer, offline=False)
    try:
        return await server_vocabulary(target)
    except ConfigError as refusal:
        # A server on this machine usually serves a model whose files are here too.
        name = target.asked.model or await first_model(target)
        try:
            return model_vocabulary(name, offline=True)
        except StartupError as missing:
            raise refusal from missing


def model_vocabulary(name: str, *, offline: bool) -> TokenVocabulary:
    """The ordinary tokens of a tokenizer.json, or of a model by name or path.

    offline  look only at what is cached, and fetch nothing
    """
    path = Path(name).expanduser()
    if path.name == "tokenizer.json" or (path / "tokenizer.json").is_file():
        return read_vocabulary(path)
    files = fetch_model(name, home=env.home(env.environment()), offline=offline)
    return read_vocabulary(files.path)


def warm_up_requests(
    spec: WorkloadSpec, vocabulary: Vocabulary, count: int, *, seed: int
) -> list[BenchRequest]:
    """`count` requests like the workload's, but with prompts that the workload does not have."""
    requests: list[BenchRequest] = []
    while len(requests) < count:
        more = spec.generate(vocabulary, seed=seed, repeat=f"warm-up/{len(requests)}")
        requests += more.requests[: count - len(requests)]
    return requests


def _show_serving(
    run: ServingRun,
    environment: Environment,
    options: Mapping[str, object],
    output: OutputOptions,
    console: Console,
    target_url: str,
) -> None:
    spec = run.workload.spec
    console.print(latency_table(run.metrics, f"{spec.name} on {target_url}"))
    console.print(totals_table(run.metrics))
    for remark in serving_remarks(run.metrics):
        console.print(f"warning: {remark}", style="yellow", markup=False)
    path = _report_path("serving", [spec.name], environment, output)
    write_json(path, serving_json(run, environment, options))
    if output.plot:
        from sapwood.bench.plots import plot_serving

        plot_serving(run.timelines, f"{spec.name}: {spec.title}", path.with_suffix(".png"))
    _show_files(path, output, console)


def bench_offline(
    generator: TokenGenerator,
    vocabulary: Vocabulary,
    offline: OfflineOptions,
    workload: WorkloadOptions,
    output: OutputOptions,
    console: Console,
    asked: Mapping[str, object],
) -> list[OfflineResult]:
    """Measure an engine in this process; the report lists the options in `asked`."""
    environment = describe_environment()
    console.print(str(environment), markup=False, soft_wrap=True)
    results = []
    for spec in workload.specs():
        _show_workload(spec, console)

        def tell(repeat: Repeat, spec: WorkloadSpec = spec) -> None:
            _show_repeat(console, spec, "", repeat)

        results.append(
            measure_workload(
                in_process(generator),
                spec,
                vocabulary,
                offline,
                seed=workload.seed,
                on_repeat=tell,
            )
        )
    console.print(offline_table(results))
    for result in results:
        for warning in result.warnings:
            console.print(f"warning: {warning}", style="yellow", markup=False)
    path = _report_path("offline", [result.spec.name for result in results], environment, output)
    options = {**asked, **options_json(offline, workload, output)}
    write_json(path, offline_json(results, environment, options))
    if output.plot:
        from sapwood.bench.plots import plot_repeats

        figures = {
            result.spec.name: (
                f"{result.spec.headline.label} ({result.spec.headline.unit})",
                result.headline_values,
            )
            for result in results
            if result.headline_values
        }
        plot_repeats(figures, "offline", path.with_suffix(".png"))
    _show_files(path, output, console)
    return results


def bench_peers(
    peers: Sequence[Peer],
    vocabulary: Vocabulary,
    options: PeersOptions,
    output: OutputOptions,
    console: Console,
) -> Comparison:
    """Compare peers whose models are loaded."""
    environment = describe_environment()
    console.print(str(environment), markup=False, soft_wrap=True)
    specs = {spec.name: spec for spec in options.specs()}
    for spec in specs.values():
        _show_workload(spec, console)
    comparison = compare(
        peers,
        list(specs.values()),
        vocabulary,
        baseline=options.baseline,
        repeats=options.repeats,
        seed=options.seed,
        on_repeat=lambda name, peer, repeat: _show_repeat(console, specs[name], peer, repeat),
    )
    facts = {peer.name: peer.facts() for peer in peers}
    console.print(comparison_table(comparison))
    console.print(peer_table(facts))
    warnings = {
        f"{peer}: {warning}"
        for of_peer in comparison.results.values()
        for peer, result in of_peer.items()
        for warning in result.warnings
    }
    for warning in sorted(warnings):
        console.print(f"warning: {warning}", style="yellow", markup=False)
    path = _report_path("peers", list(specs), environment, output)
    content = {
        "kind": "peers",
        "environment": environment,
        "options": options_json(options, output),
        "peers": facts,
        **comparison.to_json(),
    }
    write_json(path, content)
    if output.plot:
        from sapwood.bench.plots import plot_ratios

        title = f"{Path(options.model).name}, {options.dtype}, {options.num_threads} threads"
        plot_ratios(comparison.ratios(), options.baseline, title, path.with_suffix(".png"))
    _show_files(path, output, console)
    return comparison


def _show_workload(spec: WorkloadSpec, console: Console) -> None:
    console.print(f"{spec.name}: {spec.title}", markup=False, highlight=False)


def _show_repeat(console: Console, spec: WorkloadSpec, peer: str, repeat: Repeat) -> None:
    headline = spec.headline
    value = repeat.figure(headline.metric)
    shown = "no value" if value is None else f"{value:.2f} {headline.unit}"
    prefix = f"{peer} " if peer else ""
    console.print(f"{spec.name} {prefix}{headline.label} {shown}, wall {repeat.wall_s:.2f} s")


def _report_path(
    command: str, workloads: list[str], environment: Environment, output: OutputOptions
) -> Path:
    stem = report_stem(command, workloads, environment)
    return Path(output.output_dir).expanduser() / f"{stem}.json"


def _show_files(path: Path, output: OutputOptions, console: Console) -> None:
    files = [str(path), *([str(path.with_suffix(".png"))] if output.plot else [])]
    console.print(f"written: {', '.join(files)}", markup=False, soft_wrap=True)
