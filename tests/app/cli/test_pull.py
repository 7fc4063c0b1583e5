import pytest

from sapwood import store
from sapwood.app.building import model_files
from sapwood.app.cli.main import main
from sapwood.app.cli.pull import in_units
from sapwood.store import ModelFiles


@pytest.fixture
def fetched(monkeypatch, tmp_path):
    """Calls of fetch_model, which finds two weight files of 1 MB together."""
    calls = []
    weights = (tmp_path / "1.safetensors", tmp_path / "2.safetensors")
    for path in weights:
        path.write_bytes(bytes(500_000))

    def fetch_model(name, **options):
        calls.append((name, options))
        options["progress"].start("downloading", 10)
        options["progress"].finish()
        return ModelFiles(name=name, path=tmp_path, weights=weights, weight_format="safetensors")

    monkeypatch.setattr(model_files, "fetch_model", fetch_model)
    return calls


def test_pull_says_where_the_files_are_and_how_large(fetched, capsys, tmp_path):
    assert main(["pull", "a/b", "--revision", "v1", "--load-format", "safetensors"]) == 0
    [(name, options)] = fetched
    assert name == "a/b"
    assert (options["revision"], options["load_format"]) == ("v1", "safetensors")
    assert options["home"] == tmp_path / "home"
    assert options["offline"] is False
    out = capsys.readouterr().out
    assert out == f"a/b: {tmp_path}\n2 weight files, safetensors, 1.0 MB\n"


def test_progress_goes_to_stderr(fetched, capsys):
    assert main(["pull", "a/b"]) == 0
    captured = capsys.readouterr()
    assert "downloading" in captured.err
    assert "downloading" not in captured.out


def test_without_a_name_the_configured_model_is_pulled(fetched, monkeypatch):
    monkeypatch.setenv("SAPWOOD_MODEL", "from/environment")
    assert main(["pull", "--offline"]) == 0
    [(name, options)] = fetched
    assert name == "from/environment"
    assert options["offline"] is True


def test_a_name_wins_over_the_configured_model(fetched, monkeypatch):
    monkeypatch.setenv("SAPWOOD_MODEL", "from/environment")
    assert main(["pull", "named"]) == 0
    assert fetched[0][0] == "named"


def test_what_cannot_be_had_ends_with_1(capsys):
    assert main(["pull", "no-such-model"]) == 1
    error = capsys.readouterr().err
    assert "'no-such-model'" in error
    assert "Traceback" not in error


def test_the_list_has_the_catalogue(capsys):
    assert main(["pull", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(store.load_catalogue())
    assert any(line.startswith("smollm2-135m ") and "Apache-2.0" in line for line in lines)


def test_the_list_takes_no_name():
    assert main(["pull", "--list", "smollm2-135m"]) == 2


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (98_362_432, "98.4 MB"),
        (7 * 10**9, "7.0 GB"),
        (5 * 10**15, "5000.0 TB"),
    ],
)
def test_sizes_in_units(num_bytes, text):
    assert in_units(num_bytes) == text
