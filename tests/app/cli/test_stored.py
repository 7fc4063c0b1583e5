import pytest

from sapwood.app.cli.main import main
from sapwood.app.cli.stored import ago, print_table
from sapwood.schema.env import environment, home
from sapwood.store import load_catalogue


@pytest.fixture
def stored():
    """The directory of the default model, with a file that is cut short."""
    source = load_catalogue()["smollm2-135m"].sources[0]
    directory = home(environment()) / "models" / source.sha256[:32]
    directory.mkdir(parents=True)
    (directory / "tiny.gguf").write_bytes(b"GGUF")
    return directory


def test_models_are_listed_and_removed(stored, capsys):
    assert main(["list"]) == 0
    title, row = capsys.readouterr().out.splitlines()
    assert title.split() == ["NAME", "SIZE", "WEIGHTS", "USED"]
    assert row.split()[0] == "smollm2-135m"
    assert row.split()[-2:] == ["unknown", "-"]
    assert main(["rm", "smollm2-135m"]) == 0
    assert capsys.readouterr().out.startswith("removed smollm2-135m, ")
    assert not stored.exists()
    assert main(["list"]) == 0
    assert "no models yet" in capsys.readouterr().err


def test_a_name_that_is_not_there_removes_nothing(stored, capsys):
    assert main(["rm", "smollm2-135m", "smolm2-135m"]) == 1
    assert (
        "smolm2-135m is no model on this disk; did you mean smollm2-135m?"
        in capsys.readouterr().err
    )
    assert stored.exists()


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(30, "just now"), (60, "1 minute ago"), (7300, "2 hours ago"), (200_000, "2 days ago")],
)
def test_times_in_words(seconds, words):
    assert ago(seconds) == words


def test_columns_are_as_wide_as_their_widest_cell(capsys):
    print_table([("A", "B"), ("longer", "x")])
    assert capsys.readouterr().out == "A       B\nlonger  x\n"
