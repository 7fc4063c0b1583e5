import sys
from types import SimpleNamespace

import pytest

from sapwood.app.cli.main import main
from sapwood.base.errors import ModelSourceError


@pytest.fixture
def launched(monkeypatch):
    """Calls of `launch.serve`, which ends with status 7; no engine is started."""
    calls = []

    def serve(engine, server, observability, *, processes):
        assert processes == ["started"] * engine.parallel.dp_size
        calls.append((engine, server, observability))
        return 7

    monkeypatch.setattr("sapwood.app.cli.serve.start_engine_process", lambda: "started")

    monkeypatch.setitem(sys.modules, "sapwood.app.serving.launch", SimpleNamespace(serve=serve))
    return calls


def test_serve_hands_over_what_was_asked_and_ends_as_the_server_does(launched):
    flags = ["--model", "m", "--page-size", "8", "--port", "0", "--enable-metrics"]
    assert main(["serve", *flags]) == 7
    [(engine, server, observability)] = launched
    assert observability.enable_metrics
    assert (engine.model.model, engine.memory.page_size, server.port) == ("m", 8, 0)


def test_the_model_may_be_an_argument(launched):
    assert main(["serve", "m", "--port", "0"]) == 7
    [(engine, server, _)] = launched
    assert (engine.model.model, server.port) == ("m", 0)


@pytest.mark.parametrize(
    ("flag", "name"),
    [
        ("--tp", "tp_size"),
        ("--tensor-parallel-size", "tp_size"),
        ("--dp", "dp_size"),
        ("--data-parallel-size", "dp_size"),
    ],
)
def test_other_spellings_of_the_ranks(launched, flag, name):
    assert main(["serve", "m", flag, "2", "--port", "0"]) == 7
    [(engine, _, _)] = launched
    assert getattr(engine.parallel, name) == 2


def test_what_contradicts_itself_never_starts(launched, capsys):
    assert main(["serve", "--port", "70000"]) == 1
    assert "--port is 70000 but must be from 0 to 65535" in capsys.readouterr().err
    assert launched == []


def test_a_server_that_cannot_start_says_why(launched, monkeypatch, capsys):
    def serve(engine, server, observability, *, processes):
        raise ModelSourceError("no source could provide the model")

    monkeypatch.setitem(sys.modules, "sapwood.app.serving.launch", SimpleNamespace(serve=serve))
    assert main(["serve"]) == 1
    assert capsys.readouterr().err == "sapwood: no source could provide the model\n"
