import json

import pytest
from click.testing import CliRunner
from rich.console import Console
from tokenizers import Tokenizer, models

from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.bench.cli import bench
from sapwood.bench.commands import bench_offline, bench_peers
from sapwood.bench.distribution import Spread
from sapwood.bench.offline import Generated, OfflineOptions, RunResult
from sapwood.bench.peers.compare import PeerFacts, PeersOptions
from sapwood.bench.report import OutputOptions
from sapwood.bench.workloads.presets import WorkloadOptions
from sapwood.bench.workloads.vocabulary import TokenVocabulary
from tests.bench.images import num_colours

TOKENS = TokenVocabulary(tuple(range(100, 200)))
SMALL = ("--num-requests", "3", "--prompt-tokens", "6", "--output-tokens", "4")


def serve(server, tmp_path, *arguments):
    command = ["serve", "--url", server.url, "--output-dir", str(tmp_path), *arguments]
    return CliRunner(env={"COLUMNS": "160"}).invoke(bench, command)


def one_report(tmp_path):
    (path,) = tmp_path.glob("*.json")
    return json.loads(path.read_text()), path


@pytest.mark.parametrize("api", ["completions", "native", "chat"])
def test_a_server_is_measured_from_the_command_line(server, tmp_path, api):
    result = serve(server, tmp_path, "--api", api, *SMALL)
    assert result.exit_code == 0, result.output
    assert "TTFT" in result.output
    report, path = one_report(tmp_path)
    assert report["kind"] == "serving"
    assert report["metrics"]["num_completed"] == 3
    assert report["metrics"]["num_output_tokens"] == 12
    assert report["workload"]["num_requests"] == 3
    assert report["options"]["api"] == api
    assert report["environment"]["cpu"]
    assert len(report["requests"]) == 3
    assert num_colours(path.with_suffix(".png")) > 0


def test_warm_ups_are_not_counted(server, tmp_path):
    result = serve(server, tmp_path, "--num-warmups", "4", "--no-plot", *SMALL)
    assert result.exit_code == 0, result.output
    sent = [tuple(body["prompt"]) for body in server.bodies("/v1/completions")]
    assert len(set(sent)) == len(sent) == 7
    assert one_report(tmp_path)[0]["metrics"]["num_requests"] == 3
    assert list(tmp_path.glob("*.png")) == []


def test_failures_make_the_command_fail(server, tmp_path, fake):
    def reply(path, body):
        if len(server.bodies("/v1/completions")) == 2:
            return fake.Reply(status=503, body={"error": {"message": "the queue is full"}})
        return fake.answer_well(path, body)

    server.reply = reply
    result = serve(server, tmp_path, "--num-warmups", "0", *SMALL)
    assert result.exit_code == 1
    assert "1 requests failed: HTTP 503: the queue is full" in result.output
    assert one_report(tmp_path)[0]["metrics"]["failures"] == [
        {"message": "HTTP 503: the queue is full", "count": 1}
    ]


def test_each_workload_has_its_report(server, tmp_path):
    result = serve(server, tmp_path, "--workload", "fixed,random", "--no-plot", *SMALL)
    assert result.exit_code == 0, result.output
    names = {json.loads(path.read_text())["workload"]["name"] for path in tmp_path.glob("*.json")}
    assert names == {"fixed", "random"}


def test_options_come_from_the_environment_and_a_file(server, tmp_path):
    config = tmp_path / "bench.yaml"
    config.write_text("num-requests: 2\nprompt-tokens: 5\n")
    runner = CliRunner(env={"SAPWOOD_URL": server.url, "SAPWOOD_OUTPUT_TOKENS": "3"})
    output = tmp_path / "out"
    arguments = ["serve", "--config", str(config), "--output-dir", str(output), "--no-plot"]
    result = runner.invoke(bench, arguments)
    assert result.exit_code == 0, result.output
    report, _ = one_report(output)
    assert report["workload"]["parameters"] == {
        "num_requests": 2,
        "prompt_tokens": 5,
        "output_tokens": 3,
    }


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (["serve", "--workload", "a", "--num-requests", "2"], ConfigError, "does not take"),
        (["serve", "--url", "http://127.0.0.1:1"], EngineUnavailable, "start the server"),
        (["offline", "--repeats", "0"], ConfigError, "--repeats is 0"),
        (["peers", "--peers", "a,transformers"], ConfigError, "unknown peer 'a'; known: llama_cpp"),
    ],
)
def test_wrong_options_are_explained(arguments, error, message):
    result = CliRunner().invoke(bench, arguments)
    assert isinstance(result.exception, error)
    assert message in result.exception.message


@pytest.mark.parametrize("command", ["serve", "offline", "peers"])
def test_help_names_every_option(command):
    result = CliRunner(env={"COLUMNS": "200"}).invoke(bench, [command, "--help"])
    assert result.exit_code == 0
    for flag in ("--workload", "--seed", "--output-dir", "--plot", "--config"):
        assert flag in result.output


class Engine:
    name = "sapwood"

    def generate(self, prompts, output_lengths):
        return [Generated(num_output_tokens=length) for length in output_lengths]


class FakePeer:
    def __init__(self, name, speed):
        self.name = name
        self.speed = speed

    def run(self, workload):
        lengths = tuple(request.num_output_tokens for request in workload.requests)
        return RunResult(
            phase_s=(sum(lengths) / self.speed,),
            num_output_tokens=lengths,
            num_cached_tokens=(0,) * len(lengths),
        )

    def facts(self):
        return PeerFacts(versions={"x": "1"}, start_s=1.0, peak_rss_bytes=2**30)


def test_an_engine_in_this_process_is_measured(tmp_path):
    results = bench_offline(
        Engine(),
        TOKENS,
        OfflineOptions(repeats=2),
        WorkloadOptions(workload="a,random"),
        OutputOptions(output_dir=str(tmp_path)),
        Console(quiet=True),
        {"model": "tiny"},
    )
    assert [result.spec.name for result in results] == ["a", "random"]
    report, path = one_report(tmp_path)
    assert report["options"]["model"] == "tiny"
    first = report["workloads"][0]
    assert len(first["repeats"]) == 2
    assert first["figures"]["output_tok_s"]["median"] > 0
    assert first["headline"]["metric"] == "decode_tok_s"
    assert num_colours(path.with_suffix(".png")) > 0


def test_peers_are_compared(tmp_path):
    console = Console(record=True, width=160, quiet=False, file=(tmp_path / "log").open("w"))
    options = PeersOptions(workload="a,c,d", repeats=3)
    with console.file:
        comparison = bench_peers(
            [FakePeer("sapwood", 200.0), FakePeer("transformers", 100.0)],
            TOKENS,
            options,
            OutputOptions(output_dir=str(tmp_path)),
            console,
        )
    text = console.export_text()
    assert comparison.ratios()["sapwood"]["c"] == Spread.of([2.0, 2.0, 2.0])
    assert "2.00 [2.00-2.00] x" in text
    assert "peak GiB" in text
    report, path = one_report(tmp_path)
    assert report["ratios"]["sapwood"]["d"]["median"] == pytest.approx(2.0)
    assert report["peers"]["sapwood"]["start_s"] == 1.0
    assert num_colours(path.with_suffix(".png")) > 0


def without_tokenize(fake, model):
    """A server that serves `model` and has no /tokenize."""

    def reply(path, body):
        if path == "/v1/models":
            return fake.Reply(body={"data": [{"id": model}]})
        if path == "/tokenize":
            return fake.Reply(status=404, body={"detail": "Not Found"})
        return fake.answer_well(path, body)

    return reply


@pytest.mark.parametrize("api", ["completions", "native"])
def test_a_model_on_this_machine_gives_the_token_ids(server, tmp_path, fake, api):
    vocabulary = {f"word{index}": index for index in range(300, 350)}
    model = tmp_path / "model"
    model.mkdir()
    Tokenizer(models.WordLevel(vocabulary, unk_token="word300")).save(str(model / "tokenizer.json"))
    server.reply = without_tokenize(fake, str(model))
    result = serve(server, tmp_path / "out", "--api", api, "--no-plot", *SMALL)
    assert result.exit_code == 0, result.output
    path, field = {
        "completions": ("/v1/completions", "prompt"),
        "native": ("/generate", "input_ids"),
    }[api]
    sent = {token for body in server.bodies(path) for token in body[field]}
    assert sent <= set(range(300, 350))


def test_an_unknown_model_without_tokenize_says_the_way_out(server, tmp_path, fake):
    server.reply = without_tokenize(fake, "tiny")
    result = serve(server, tmp_path, "--no-plot", *SMALL)
    assert isinstance(result.exception, ConfigError)
    assert "--tokenizer, or use --prompts text" in result.exception.message


def test_a_named_tokenizer_wins_over_the_servers(server, tmp_path):
    vocabulary = {f"word{index}": index for index in range(400, 450)}
    file = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel(vocabulary, unk_token="word400")).save(str(file))
    output = tmp_path / "out"
    result = serve(server, output, "--tokenizer", str(file), "--no-plot", *SMALL)
    assert result.exit_code == 0, result.output
    assert server.bodies("/tokenize") == []
    sent = {token for body in server.bodies("/v1/completions") for token in body["prompt"]}
    assert sent <= set(range(400, 450))
