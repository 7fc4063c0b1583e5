"""Options of the evaluations. No torch, so that the command line starts fast."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sapwood.base.errors import ConfigError
from sapwood.bench.evals.tasks import RUNS_PROGRAMS
from sapwood.bench.http_stream import Endpoint
from sapwood.schema.config.options import option

THINKING = ("on", "off")


@dataclass(frozen=True, slots=True, kw_only=True)
class PerplexityOptions:
    """The text that is scored."""

    text_file: str | None = option(
        None, "Text to score, UTF-8; default: the docstrings of Python's standard library."
    )
    num_text_tokens: int = option(32768, "Tokens of the text to score at most.", unit="tokens")
    window: int = option(1024, "Tokens that are scored on their own context.", unit="tokens")
    output_dir: str = option("bench-results", "Directory for the JSON file.")

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ConfigError(f"--window is {self.window} but must be >= 2")
        if self.num_text_tokens < self.window:
            raise ConfigError(
                f"--num-text-tokens is {self.num_text_tokens} but must be at least one --window "
                f"({self.window})"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class EvalOptions:
    """The questions, the server or servers that answer them, and how they are sampled."""

    eval_name: str = option(
        "mmlu", "Evaluation: aime25, gpqa, gsm8k, humaneval, mgsm, mmlu, mmmu, or a plug-in's."
    )
    data: str = option(
        "",
        "File of the questions, in the form that docs/benchmarking.md shows; may be given several "
        "times.",
        many=True,
        aliases=("dataset-path",),
    )
    url: str = option(
        "http://127.0.0.1:30000", "Base URL of the server, without /v1.", aliases=("base-url",)
    )
    baseline_url: str | None = option(
        None, "A second server, which is asked the same questions in the same minutes."
    )
    compare_with: str | None = option(
        None, "JSON file of an earlier run of this evaluation, to compare with."
    )
    model: str | None = option(
        None, "Model name to send; default: the first that /v1/models lists."
    )
    api_key: str | None = option(None, "Sent as a bearer token.", secret=True)
    num_examples: int | None = option(
        None, "Ask this many questions, drawn with --seed; default: all.", unit="questions"
    )
    num_shots: int = option(
        5, "Solved questions shown before each other one, in gsm8k.", unit="questions"
    )
    repeat: int = option(1, "Ask each question this often.", unit="times")
    max_concurrency: int = option(
        32, "Questions in flight at most.", unit="questions", aliases=("num-threads",)
    )
    max_tokens: int = option(2048, "Length of an answer at most.", unit="tokens")
    temperature: float = option(0.0, "Sampling temperature; 0: greedy.")
    top_p: float = option(1.0, "Sample from the most probable tokens that sum to this.")
    top_k: int | None = option(None, "Sample from this many most probable tokens.", unit="tokens")
    seed: int = option(0, "Seed of what is drawn: questions, the order of choices, samples.")
    thinking: str | None = option(
        None, "Whether the chat template lets the model think; default: its own.", choices=THINKING
    )
    reasoning_effort: str | None = option(None, "Sent as reasoning_effort, as it is.")
    request_timeout: float = option(
        600.0, "A question without a whole answer after this long has failed.", unit="seconds"
    )
    run_programs: bool = option(
        False, "Run the programs that the model writes, on this machine, as humaneval needs."
    )
    output_dir: str = option("bench-results", "Directory for the JSON file.")

    def __post_init__(self) -> None:
        for url in (self.url, self.baseline_url):
            if url is not None:
                Endpoint.parse(url)
        for name in ("num_examples", "repeat", "max_concurrency", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"--{name.replace('_', '-')} is {value} but must be >= 1")
        if self.num_shots < 0:
            raise ConfigError(f"--num-shots is {self.num_shots} but must be >= 0")
        if not self.data.split():
            raise ConfigError(
                "--data names no file: sapwood brings no questions with it; docs/benchmarking.md "
                "shows the form of each evaluation's files"
            )
        if self.eval_name in RUNS_PROGRAMS and not self.run_programs:
            raise ConfigError(
                f"--eval-name {self.eval_name} runs what the model writes, with this user's rights "
                "and without a sandbox: ask for that with --run-programs, in a container or on a "
                "machine that has nothing to lose"
            )

    @property
    def paths(self) -> list[Path]:
        return [Path(line).expanduser() for line in self.data.splitlines() if line.strip()]

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"authorization": f"Bearer {self.api_key}"}
