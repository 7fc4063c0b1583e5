import pytest
from click.testing import CliRunner

from sapwood.app.cli import chat as chat_module
from sapwood.app.cli import run as run_module
from sapwood.app.cli.main import cli
from tests.app.cli.test_chat import Echo


@pytest.fixture
def opened(monkeypatch):
    """What backends are opened with; the server that runs has the model tiny."""
    calls = []

    def open_backend(options, asked):
        calls.append((options.url, asked.engine().model.model))
        return Echo()

    monkeypatch.setattr(chat_module, "open_backend", open_backend)
    monkeypatch.setattr("sapwood.app.serving.running.served_model", lambda url, api_key: "tiny")
    return calls


def run(*args, stdin="hello"):
    return CliRunner().invoke(cli, ["run", *args], input=stdin)


def test_a_server_that_has_the_model_answers(opened):
    result = run("tiny")
    assert opened == [("http://127.0.0.1:30000", "tiny")]
    assert result.stdout == "<hello>\n"
    assert "using the server at http://127.0.0.1:30000" in result.stderr


def test_another_model_runs_here(opened):
    assert run("other", "a question").stdout == "<a question>\n"
    assert opened == [(None, "other")]


def test_without_a_name_it_is_the_configured_model(opened):
    assert run().exit_code == 0
    assert opened == [(None, "default")]


def test_options_of_the_engine_ask_for_an_engine_of_ones_own(opened):
    assert run("tiny", "--context-length", "64").exit_code == 0
    assert opened == [(None, "tiny")]


def test_a_named_server_is_not_looked_for(opened):
    assert run("tiny", "--url", "http://127.0.0.1:1").exit_code == 0
    assert opened == [("http://127.0.0.1:1", "tiny")]


def test_a_key_goes_to_no_engine_here(opened, monkeypatch):
    asked_with = []
    monkeypatch.setattr(run_module, "server_with", lambda name, api_key: asked_with.append(api_key))
    assert run("tiny", "--api-key", "sesame").exit_code == 0
    assert asked_with == ["sesame"]
    assert opened == [(None, "tiny")]
