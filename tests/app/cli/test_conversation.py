import json
import signal

import pytest

from sapwood.app.cli.chat_backends import Piece
from sapwood.app.cli.conversation import COMMANDS, Conversation, Quit, Speed, without_controls
from sapwood.base.clock import ManualClock
from sapwood.base.errors import EngineUnavailable, SapwoodError


class Script:
    """A backend that says the pieces of a script, one script per question.

    An exception in a script is raised, a function is called.
    """

    model = "scripted"

    def __init__(self, *scripts):
        self.scripts = list(scripts)
        self.asked = []

    def answer(self, messages):
        self.asked.append([dict(message) for message in messages])
        for step in self.scripts.pop(0):
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Piece):
                yield step
            elif callable(step):
                step()
            else:
                yield Piece(text=step)

    def close(self):
        pass


def interrupt():
    signal.raise_signal(signal.SIGINT)


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def test_the_history_goes_with_each_question(capsys):
    backend = Script(["Hel", "lo"], ["Bye"])
    conversation = Conversation(backend, system="Be brief.")
    conversation.ask("Hi")
    conversation.ask("Go")
    system = {"role": "system", "content": "Be brief."}
    assert backend.asked == [
        [system, user("Hi")],
        [system, user("Hi"), assistant("Hello"), user("Go")],
    ]
    assert capsys.readouterr().out == "Hello\nBye\n"


def test_an_answer_that_never_began_prints_nothing(capsys):
    with pytest.raises(EngineUnavailable):
        Conversation(Script([EngineUnavailable("gone")])).ask("Hi")
    assert capsys.readouterr().out == ""


def test_a_question_that_failed_is_forgotten():
    backend = Script(["Hel", EngineUnavailable("gone")], ["Hello"])
    conversation = Conversation(backend)
    with pytest.raises(EngineUnavailable):
        conversation.ask("Hi")
    assert conversation.messages == []
    conversation.ask("Hi")
    assert conversation.messages == [user("Hi"), assistant("Hello")]


def test_ctrl_c_keeps_what_was_said(capsys):
    backend = Script(["one ", interrupt, "two ", "three"])
    conversation = Conversation(backend)
    conversation.ask("Count")
    assert conversation.messages == [user("Count"), assistant("one two ")]
    captured = capsys.readouterr()
    assert captured.out == "one two \n"
    assert captured.err == "(stopped)\n"


def test_a_second_ctrl_c_stops_an_answer_that_hangs():
    def hang():
        interrupt()
        interrupt()
        raise AssertionError("the second interrupt was lost")

    conversation = Conversation(Script(["one", hang]))
    conversation.ask("Count")
    assert conversation.messages == [user("Count"), assistant("one")]


def test_ctrl_c_before_any_text_forgets_the_question():
    conversation = Conversation(Script([interrupt, ""]))
    conversation.ask("Count")
    assert conversation.messages == []


def test_reasoning_is_no_part_of_the_answer(capsys):
    script = [Piece(text="hm", is_reasoning=True), "Yes"]
    plain, shown = Conversation(Script(script)), Conversation(Script(script), is_terminal=True)
    plain.ask("?")
    assert capsys.readouterr().out == "Yes\n"
    shown.ask("?")
    assert "hm" in capsys.readouterr().out
    assert plain.messages == shown.messages == [user("?"), assistant("Yes")]


def test_an_answer_cannot_steer_the_terminal(capsys):
    text = "\x1b[2Jred\x07\ttab\x9b\n"
    Conversation(Script([text]), is_terminal=True).ask("?")
    assert capsys.readouterr().out == "[2Jred\ttab\n\n"
    Conversation(Script([text]), is_terminal=False).ask("?")
    assert capsys.readouterr().out == text + "\n"


def test_without_controls_leaves_text_alone():
    text = "Grüße, 世界 🌳\n\tok"
    assert without_controls(text) == text


def test_verbose_tells_the_speed(capsys):
    clock = ManualClock()
    backend = Script(
        [
            lambda: clock.advance(0.5),
            Piece(text="a", num_output_tokens=1),
            lambda: clock.advance(2.0),
            Piece(text="b", num_output_tokens=9),
            lambda: clock.advance(5.0),
            Piece(text="", num_output_tokens=9),
        ]
    )
    Conversation(backend, verbose=True, clock=clock).ask("?")
    assert capsys.readouterr().err == "[9 tokens, 4.0 tok/s, first after 0.50 s]\n"


def test_a_server_that_does_not_count_is_counted_by_pieces(capsys):
    Conversation(Script(["a", "", "b"]), verbose=True, clock=ManualClock()).ask("?")
    assert capsys.readouterr().err == "[2 tokens, first after 0.00 s]\n"


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_one_token_has_no_speed(num_tokens):
    speed = Speed(num_tokens=num_tokens, first_token_s=1.0, rest_s=1.0)
    assert str(speed) == f"{num_tokens} tokens, first after 1.00 s"


def test_clear_forgets_but_keeps_the_system_prompt():
    conversation = Conversation(Script(["Hello"]), system="Be brief.")
    conversation.ask("Hi")
    conversation.command("/clear")
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]


def test_system_is_set_and_shown(capsys):
    conversation = Conversation(Script())
    conversation.command("/system")
    conversation.command("/system Be  brief.")
    conversation.command("/system")
    assert capsys.readouterr().out == "(no system prompt)\nBe  brief.\nBe  brief.\n"
    assert conversation.messages == [{"role": "system", "content": "Be  brief."}]


def test_save_writes_the_messages(tmp_path):
    conversation = Conversation(Script(["Grüße"]), system="s")
    conversation.ask("Hi")
    path = tmp_path / "a name.json"
    conversation.command(f"/save {path}")
    saved = json.loads(path.read_text("utf-8"))
    assert saved == {"model": "scripted", "messages": conversation.messages}
    assert "Grüße" in path.read_text("utf-8")


@pytest.mark.parametrize("target", ["", "/no/such/directory/x.json"])
def test_a_file_that_cannot_be_written_is_said(target):
    with pytest.raises(SapwoodError, match=r"/save FILE|cannot write"):
        Conversation(Script()).command(f"/save {target}")


def test_quit_leaves():
    with pytest.raises(Quit):
        Conversation(Script()).command("/quit")


def test_help_names_every_command(capsys):
    Conversation(Script()).command("/help")
    shown = capsys.readouterr().out
    assert all(name in shown for name in COMMANDS)


def test_an_unknown_command_is_refused_with_the_known_ones():
    with pytest.raises(SapwoodError, match="there is no command /exit; there are /help, "):
        Conversation(Script()).command("/exit")
