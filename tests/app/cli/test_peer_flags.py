"""Every flag of SGLang 0.5.8 is an option, a hint, or refused with the way out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from sapwood.app.cli.llama_cpp_flags import LLAMA_CPP_ROWS
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.app.cli.peer_flag import Fate, Values
from sapwood.app.cli.peer_flags import PEER_ROWS, say_hints
from sapwood.app.cli.serve import serve
from sapwood.app.cli.vllm_flags import VLLM_ROWS
from sapwood.base.errors import ConfigError
from sapwood.schema.config.engine import COMPONENTS
from sapwood.schema.config.server import ServerConfig

SGLANG = (Path(__file__).parent / "sglang_flags.txt").read_text(encoding="utf-8").split()
OWN = {flag for param in serve.params for flag in param.opts}
OTHERS = {**VLLM_ROWS, **LLAMA_CPP_ROWS}


def ask(*args: str) -> Asked:
    @click.command(cls=ConfigCommand)
    @click.argument("name", required=False)
    @config_options(ServerConfig, *COMPONENTS)
    def command(name: str | None, asked: Asked) -> Asked:
        return asked.with_model(name)

    asked: Asked = command.main(args=list(args), standalone_mode=False)
    return asked


def test_every_flag_has_a_row() -> None:
    assert len(SGLANG) > 300
    assert [flag for flag in SGLANG if flag not in OWN and flag not in PEER_ROWS] == []


def test_no_row_is_for_a_flag_that_sglang_lacks() -> None:
    assert sorted(set(PEER_ROWS) - set(SGLANG)) == []


def test_no_row_is_for_an_option() -> None:
    assert sorted({*PEER_ROWS, *OTHERS} & OWN) == []


def test_no_flag_is_in_two_tables() -> None:
    assert sorted(OTHERS.keys() & PEER_ROWS.keys()) == []
    assert sorted(VLLM_ROWS.keys() & LLAMA_CPP_ROWS.keys()) == []


def test_what_a_row_names_is_an_option() -> None:
    for row in OTHERS.values():
        assert set(re.findall(r"--[a-z-]+", row.says)) <= OWN, row


@pytest.mark.parametrize("flag", sorted({*PEER_ROWS, *OTHERS} - OWN))
def test_each_row_does_what_it_says(flag: str) -> None:
    row = {**PEER_ROWS, **OTHERS}[flag]
    given = {Values.NONE: [flag], Values.ONE: [flag, "-7"], Values.MANY: [flag, "7", "8"]}
    given[Values.MAYBE] = [flag, "on"]
    args = ["--port", "1", *given[row.values], "--page-size", "16"]
    if row.fate is Fate.REFUSED:
        with pytest.raises(click.UsageError, match=flag) as refused:
            ask(*args)
        assert row.says in refused.value.message
        return
    if row.fate is Fate.SAME:
        own = next(param for param in serve.params if row.says in param.opts)
        assert isinstance(own, click.Option)
        assert own.is_flag == (row.values is Values.NONE)
        return
    asked = ask(*args)
    assert [hint.written for hint in asked.hints] == [" ".join(given[row.values])]
    assert asked.build(ServerConfig).port == 1
    assert asked.engine().memory.page_size == 16


def test_command_lines_of_vllm_and_llama_cpp_are_understood(tmp_path: Path) -> None:
    asked = ask("m", "--max-model-len", "512", "--max-num-seqs=3", "--no-enable-prefix-caching")
    config = asked.engine()
    assert config.model.model == "m"
    assert config.model.context_length == 512
    assert config.scheduler.max_running_requests == 3
    assert config.memory.disable_radix_cache
    words = ("-m", "x.gguf", "-c", "256", "-np", "2", "-fa", "-ngl", "99", "-t", "1", "--jinja")
    asked = ask(*words, "--alias", "oak", "-fa", "on")
    config = asked.engine()
    assert (config.model.model, config.model.context_length) == ("x.gguf", 256)
    assert config.execution.num_threads == 1
    assert [hint.written for hint in asked.hints] == ["-fa", "-ngl 99", "--jinja", "-fa on"]
    file = tmp_path / "vllm.yaml"
    file.write_text("max-model-len: 128\nasync_scheduling: true\n")
    asked = ask("--config", str(file))
    assert asked.engine().model.context_length == 128
    assert len(asked.hints) == 1


def test_a_hints_value_is_not_the_models_name() -> None:
    asked = ask("--attention-backend", "flashinfer", "m", "--enable-mixed-chunk")
    assert asked.engine().model.model == "m"
    assert len(asked.hints) == 2


def test_a_value_that_looks_like_a_hint_stays_a_value() -> None:
    assert ask("--api-key", "--enable-mixed-chunk").build(ServerConfig).api_key == (
        "--enable-mixed-chunk"
    )


def test_what_is_so_anyway_is_not_refused() -> None:
    assert len(ask("--disaggregation-decode-tp", "1", "--gpu-id-step=1").hints) == 2
    assert len(ask("--distributed-executor-backend", "mp", "--swap-space=0").hints) == 2


@pytest.mark.parametrize("args", [["--sampling-backend"], ["--enable-mixed-chunk=1"]])
def test_wrong_numbers_of_values_are_refused(args: list[str]) -> None:
    with pytest.raises(click.UsageError, match=args[0].partition("=")[0]):
        ask(*args)


def test_the_keys_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "sglang.yaml"
    file.write_text("port: 7\nattention-backend: fa3\nenable_mixed_chunk: true\n")
    asked = ask("--config", str(file))
    assert [hint.written for hint in asked.hints] == [
        "--attention-backend fa3",
        "--enable-mixed-chunk",
    ]
    file.write_text("cpu-offload-gb: 4\n")
    with pytest.raises(ConfigError, match="--cpu-offload-gb"):
        ask("--config", str(file))


def test_hints_are_said_and_strict_flags_refuse_them(capsys: pytest.CaptureFixture[str]) -> None:
    hints = ask("--sampling-backend", "4").hints
    say_hints(hints, is_strict=False)
    assert "--sampling-backend 4" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="--sampling-backend 4"):
        say_hints(hints, is_strict=True)


def test_every_command_says_hints_and_serve_may_refuse_them() -> None:
    @click.command(cls=ConfigCommand)
    @config_options(*COMPONENTS, ServerConfig)
    def command(asked: Asked) -> None:
        click.echo(asked.build(ServerConfig).port)

    said = CliRunner().invoke(command, ["--sampling-backend", "4"])
    assert (said.exit_code, said.stdout) == (0, "30000\n")
    assert "--sampling-backend 4 has nothing to choose here" in said.stderr
    refused = CliRunner().invoke(command, ["--sampling-backend", "4", "--strict-flags"])
    assert isinstance(refused.exception, ConfigError)


def test_launch_server_is_serve() -> None:
    command = [sys.executable, "-m", "sapwood.launch_server", "--cpu-offload-gb", "4"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 2
    assert "--cpu-offload-gb is not served" in done.stderr
