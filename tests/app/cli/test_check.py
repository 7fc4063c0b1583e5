import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from sapwood.app.building import resolving
from sapwood.app.cli import check as check_module
from sapwood.app.cli import machine_report
from sapwood.app.cli.machine_report import compiler_row, kernel_rows, machine_rows, make_report
from sapwood.app.cli.main import main
from sapwood.base.errors import ModelSourceError
from sapwood.kernels.platform import Platform
from sapwood.kernels.registry import Need, Selection
from sapwood.schema.config.decision import Decision
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.execution import ExecutionConfig
from sapwood.schema.config.memory import MemoryConfig
from sapwood.schema.config.options import Given
from sapwood.schema.pooling import Pooling
from sapwood.store import ModelFiles
from tests.tiny import write_llama

NEED = Need(device="cpu", dtype=torch.float32, head_dim=64, page_size=16)
FACTS = Platform(
    device="cpu",
    machine="x86_64",
    cpu_name="Some CPU",
    cpu_flags=frozenset({"fma", "avx2"}),
    num_cores=2,
    memory_bytes=2**30,
    device_names=(),
)


class Refusing:
    name = "first"

    @staticmethod
    def why_not(need):
        return "needs a GPU"


class Working(Refusing):
    name = "second"
    isa = "avx9"

    @staticmethod
    def why_not(need):
        return None


class Slow(Working):
    name = "third"


TABLE = {
    name: f"{__name__}:{kind.__name__}"
    for name, kind in [("first", Refusing), ("second", Working), ("third", Slow)]
}


@pytest.fixture(autouse=True)
def _this_module_can_be_imported(monkeypatch):
    import sys

    monkeypatch.setitem(
        sys.modules,
        __name__,
        SimpleNamespace(Refusing=Refusing, Working=Working, Slow=Slow),
    )


def test_kernels_are_used_refused_or_not_needed():
    rows = {row.name: (row.value, row.why) for row in kernel_rows(NEED, None, TABLE)}
    assert rows == {
        "first": ("refused", "needs a GPU"),
        "second": ("used", f"for {NEED}, with avx9 instructions"),
        "third": ("not needed", "slower than the one used"),
    }


def test_kernels_that_were_asked_for():
    rows = {row.name: row.value for row in kernel_rows(NEED, "third", TABLE)}
    assert rows == {"first": "not tried", "second": "not tried", "third": "used"}


def test_kernels_that_cannot_be_used():
    [row] = kernel_rows(NEED, "first", TABLE)
    assert (row.name, row.value) == ("none", "refused")
    assert "needs a GPU" in row.why


def test_machine_rows():
    rows = {row.name: row.value for row in machine_rows(FACTS)}
    assert rows == {
        "processor": "Some CPU",
        "instructions": "avx2 fma",
        "usable cores": 2,
        "memory": "1.0 GiB",
        "GPUs": "none",
        "default device": "cpu",
    }


def test_the_compiler(monkeypatch):
    monkeypatch.setattr(
        machine_report.shutil, "which", lambda name: "/bin/g++" if name == "g++" else None
    )
    done = subprocess.CompletedProcess([], 0, stdout="g++ 12.2.0\nCopyright\n")
    monkeypatch.setattr(machine_report.subprocess, "run", lambda *_, **__: done)
    row = compiler_row()
    assert (row.value, row.why) == ("/bin/g++", "g++ 12.2.0")


def test_a_compiler_that_does_not_run(monkeypatch):
    monkeypatch.setattr(machine_report.shutil, "which", lambda name: "/no/such/compiler")
    row = compiler_row()
    assert row.value == "/no/such/compiler"
    assert row.why.startswith("does not run")


def test_no_compiler(monkeypatch):
    monkeypatch.setattr(machine_report.shutil, "which", lambda name: None)
    assert compiler_row().value == "none"


def resolved(tmp_path):
    shape = SimpleNamespace(
        architecture="LlamaForCausalLM",
        num_layers=2,
        hidden_size=8,
        num_heads=4,
        num_kv_heads=2,
        head_dim=64,
    )
    files = ModelFiles(
        name="tiny", path=tmp_path, weights=(tmp_path / "w.gguf",), weight_format="gguf"
    )
    return SimpleNamespace(
        config=EngineConfig(
            memory=MemoryConfig(page_size=8, max_total_tokens=64),
            execution=ExecutionConfig(device="cpu"),
        ),
        decisions=[Decision("max_total_tokens", 64, "all that fits")],
        files=files,
        shape=shape,
        kernels=Selection(kernels=SimpleNamespace(name="second"), refusals={}, why="the fastest"),
        pooling=Pooling(task="embed", method="last", why="asked", size=8),
    )


def test_every_option_has_its_reason_its_source_or_the_default(tmp_path):
    given = {"page_size": Given(8, "the command line")}
    report = make_report(EngineConfig(), given, resolved(tmp_path), None)
    rows = {row.name: (row.value, row.why) for row in report.configuration}
    assert rows["page_size"] == (8, "from the command line")
    assert rows["max_total_tokens"] == (64, "all that fits")
    assert rows["schedule_policy"] == ("lpm", "the default")
    assert rows["kernels"][0] == "second"
    model = {row.name: row.value for row in report.model}
    assert model == {"name": "tiny", "weights": "gguf", "architecture": "LlamaForCausalLM"}


@pytest.fixture
def found(monkeypatch, tmp_path):
    """What the command resolves, instead of a model of this machine."""
    asked = []

    def resolve_config(config, *, home, progress=None, is_verified=False):
        asked.append((config, home))
        return resolved(tmp_path)

    monkeypatch.setattr(resolving, "resolve_config", resolve_config)
    monkeypatch.setattr(check_module, "fetch_with_bar", lambda model: None)
    return asked


def test_check_prints_tables(found, capsys, tmp_path):
    assert main(["check", "--page-size", "8"]) == 0
    [(config, home)] = found
    assert config.memory.page_size == 8
    assert home == tmp_path / "home"
    out = capsys.readouterr().out
    for title in ("Machine", "Software", "Kernels", "Model", "Configuration"):
        assert f"{title} " in out
    assert "from the command" in out  # the last word may stand in the next line
    assert torch.__version__ in out


def test_check_prints_json(found, capsys):
    assert main(["check", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert set(report) == {
        "machine",
        "software",
        "kernels",
        "model",
        "configuration",
        "problem",
    }
    assert report["problem"] is None
    assert {"name": "max_total_tokens", "value": 64, "why": "all that fits"} in report[
        "configuration"
    ]


@pytest.mark.parametrize("args", [[], ["--json"]])
def test_what_would_not_start_ends_with_1_but_shows_the_machine(monkeypatch, capsys, args):
    def fetch(model):
        raise ModelSourceError("no source could provide the model")

    monkeypatch.setattr(check_module, "fetch_with_bar", fetch)
    assert main(["check", "--model", "absent", *args]) == 1
    captured = capsys.readouterr()
    if args:
        report = json.loads(captured.out)
        assert report["problem"] == "no source could provide the model"
        assert report["machine"]
        assert report["configuration"] == []
    else:
        assert captured.err == "sapwood: no source could provide the model\n"
        assert "Machine" in captured.out
        assert "Configuration" not in captured.out


@pytest.mark.parametrize(
    ("asked", "row"),
    [
        (
            [],
            {
                "name": "tool_call_parser",
                "value": "generic",
                "why": "the chat template has no place for tools",
            },
        ),
        (
            ["--chat-template", "chatml-tools"],
            {
                "name": "tool_call_parser",
                "value": "qwen25",
                "why": "the chat template shows calls in this format",
            },
        ),
        (
            ["--tool-call-parser", "mistral"],
            {"name": "tool_call_parser", "value": "mistral", "why": "from the command line"},
        ),
    ],
)
def test_how_answers_are_read_is_told(tmp_path, capsys, asked, row):
    directory = write_llama(tmp_path / "m")
    flags = ["--model", str(directory), "--load-format", "dummy", "--device", "cpu"]
    assert main(["check", "--json", *flags, *asked]) == 0
    configuration = json.loads(capsys.readouterr().out)["configuration"]
    assert row in configuration
    reasoning = next(one for one in configuration if one["name"] == "reasoning_parser")
    assert reasoning["value"] == "none"


def test_a_parser_that_is_not_known_ends_with_1(tmp_path, capsys):
    directory = write_llama(tmp_path / "m")
    flags = ["--model", str(directory), "--load-format", "dummy", "--device", "cpu"]
    assert main(["check", *flags, "--tool-call-parser", "nope"]) == 1
    assert "unknown tool-call parser 'nope'" in capsys.readouterr().err


def test_options_that_contradict_each_other_end_with_1(capsys):
    assert main(["check", "--page-size", "0"]) == 1
    assert "--page-size is 0" in capsys.readouterr().err


def test_a_path_with_brackets_is_shown_as_it_is(found, capsys, monkeypatch):
    row = machine_report.Row(name="path", value=Path("/models/[bold]x"), why="[/]")
    check_module._print_table("Paths", [row])
    assert "/models/[bold]x" in capsys.readouterr().out
