import sys

import click
import pytest
from click.testing import CliRunner

from sapwood.app.cli import chat as chat_module
from sapwood.app.cli.chat import ChatOptions, read_message, talk
from sapwood.app.cli.chat_backends import InProcess, Piece, Remote
from sapwood.app.cli.conversation import Conversation
from sapwood.app.cli.main import cli, main
from sapwood.app.cli.options import read_asked
from sapwood.base.errors import ConfigError, EngineUnavailable
from sapwood.schema.config.engine import COMPONENTS


class Echo:
    """A backend that repeats the question, and fails on "fail"."""

    model = "echo"
    is_closed = False

    def __init__(self):
        self.asked = []

    def answer(self, messages):
        question = messages[-1]["content"]
        self.asked.append(question)
        if question == "fail":
            raise EngineUnavailable("the echo is gone")
        yield Piece(text=f"<{question}>")

    def close(self):
        self.is_closed = True


@pytest.fixture
def echo(monkeypatch):
    backend = Echo()
    monkeypatch.setattr(chat_module, "open_backend", lambda options, asked: backend)
    return backend


def run(*args, stdin=None):
    return CliRunner().invoke(cli, ["chat", *args], input=stdin)


def test_an_input_that_is_no_terminal_is_one_message(echo):
    result = run(stdin="line one\nline two\n\n")
    assert echo.asked == ["line one\nline two"]
    assert result.stdout == "<line one\nline two>\n"
    assert result.stderr == ""
    assert result.exit_code == 0
    assert echo.is_closed


def test_an_empty_input_is_wrong_usage(echo):
    result = run(stdin=" \n")
    assert result.exit_code == 2
    assert "the input is empty" in result.stderr


def test_messages_are_turns_and_the_input_is_left_alone(echo):
    result = run("-m", "a", "--message", "b", stdin="unread")
    assert echo.asked == ["a", "b"]
    assert result.stdout == "<a>\n<b>\n"


def test_a_failure_ends_a_chat_that_nobody_watches(echo, capsys):
    assert main(["chat", "-m", "fail", "-m", "never asked"]) == 1
    assert "the echo is gone" in capsys.readouterr().err
    assert echo.asked == ["fail"]
    assert echo.is_closed


@pytest.fixture
def typed(monkeypatch):
    """Lines that are typed; an exception is raised in their place. Ends with Ctrl-D."""

    def type_lines(*lines):
        left = iter(lines)
        prompts = []

        def fake_input(prompt):
            prompts.append(prompt)
            line = next(left, EOFError())
            if isinstance(line, BaseException):
                raise line
            return line

        monkeypatch.setattr("builtins.input", fake_input)
        return prompts

    return type_lines


def test_lines_are_answered_until_the_end(typed, capsys):
    typed("one", "", "  ", "two")
    backend = Echo()
    talk(Conversation(backend))
    assert backend.asked == ["one", "two"]
    assert capsys.readouterr().out == "<one>\n<two>\n\n"


def test_quit_ends_it(typed):
    typed("one", "/quit", "two")
    backend = Echo()
    talk(Conversation(backend))
    assert backend.asked == ["one"]


def test_ctrl_c_at_the_prompt_does_not_leave(typed, capsys):
    typed("one", KeyboardInterrupt(), "two")
    backend = Echo()
    talk(Conversation(backend))
    assert backend.asked == ["one", "two"]
    assert "Ctrl-D" in capsys.readouterr().err


def test_a_failure_does_not_leave(typed, capsys):
    typed("fail", "/nope", "two")
    backend = Echo()
    talk(Conversation(backend))
    assert backend.asked == ["fail", "two"]
    error = capsys.readouterr().err
    assert "sapwood: the echo is gone" in error
    assert "there is no command /nope" in error


def test_a_backslash_goes_on_with_the_next_line(typed):
    prompts = typed("a\\", "b\\", "c")
    assert read_message() == "a\nb\nc"
    assert prompts == ["> ", "… ", "… "]


def test_a_terminal_is_greeted_and_its_lines_are_remembered(echo, typed, monkeypatch, tmp_path):
    typed("one")
    runner = CliRunner()
    with runner.isolation() as (out, err, _):
        monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
        assert main(["chat"]) == 0
        assert b"echo; /help lists the commands" in err.getvalue()
        assert out.getvalue() == b"<one>\n\n"
    history = tmp_path / "home" / "chat_history"
    assert history.is_file()
    assert history.stat().st_mode & 0o077 == 0


def asked_for(flags):
    return read_asked([ChatOptions, *COMPONENTS], flags, None)


def open_for(**flags):
    asked = asked_for(flags)
    return chat_module.open_backend(asked.build(ChatOptions), asked)


def test_without_a_url_the_engine_runs_here(monkeypatch, make_services):
    opened = []

    class LLM:
        services = make_services()[0]

    def open_llm(config):
        opened.append(config)
        return LLM()

    monkeypatch.setattr(chat_module, "open_llm", open_llm)
    backend = open_for(page_size=8, temperature=0.5)
    assert isinstance(backend, InProcess)
    assert opened[0].memory.page_size == 8


def test_a_url_is_a_server():
    backend = open_for(url="http://h", model="m", seed=3)
    assert isinstance(backend, Remote)
    assert backend.model == "m"
    backend.close()


def test_engine_options_are_refused_with_a_url():
    with pytest.raises(click.UsageError, match="--dtype, --page-size"):
        open_for(url="http://h", model="m", page_size=8, dtype="float32")


def test_engine_options_of_the_environment_are_not(monkeypatch):
    monkeypatch.setenv("SAPWOOD_PAGE_SIZE", "8")
    open_for(url="http://h", model="m").close()


def test_a_key_needs_a_url():
    with pytest.raises(click.UsageError, match="--url"):
        open_for(api_key="k")


def test_sampling_is_only_what_was_asked_for():
    assert ChatOptions().sampling == {}
    options = ChatOptions(temperature=0.0, top_p=0.5, max_new_tokens=5, seed=0, verbose=True)
    assert options.sampling == {"temperature": 0.0, "top_p": 0.5, "max_new_tokens": 5, "seed": 0}


def test_a_bad_option_is_refused():
    with pytest.raises(ConfigError):
        asked_for({"page_size": 0}).engine()


def test_a_picture_goes_with_the_first_message(echo, tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(b"png")
    answer = run("--image", str(path), "--image", "https://x/b.png", "-m", "what?", "-m", "and?")
    assert answer.exit_code == 0, answer.output
    urls = [part["image_url"]["url"] for part in echo.asked[0][:-1]]
    assert urls == ["data:image/png;base64,cG5n", "https://x/b.png"]
    assert echo.asked[0][-1] == {"type": "text", "text": "what?"}
    assert echo.asked[1] == "and?"
    missing = run("--image", str(tmp_path / "none.png"), "-m", "what?")
    assert missing.exit_code != 0


def test_a_command_attaches_a_picture(echo, tmp_path):
    path = tmp_path / "a.jpg"
    path.write_bytes(b"jpg")
    conversation = Conversation(echo)
    conversation.command(f"/image {path}")
    conversation.ask("what?")
    conversation.ask("and?")
    assert echo.asked[0][0]["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert echo.asked[1] == "and?"
