from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from sapwood.app.cli.main import cli, main
from sapwood.app.offline.llm import LLM
from sapwood.app.serving.launch import serve
from sapwood.base.errors import IntegrityError
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.server import ServerConfig
from tests.tiny import write_llama


@pytest.fixture
def model(tmp_path):
    directory = write_llama(tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"weights")
    return directory


def test_generate_and_check(model, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["verify", "generate", str(model)]) == 0
    assert "checksums.json: 4 files" in capsys.readouterr().out
    listed = json.loads((tmp_path / "checksums.json").read_text())["files"]
    assert listed["model.safetensors"]["size"] == 7
    assert main(["verify", "check", str(model), "checksums.json"]) == 0
    assert "4 files are what checksums.json says" in capsys.readouterr().out
    (model / "model.safetensors").write_bytes(b"Weights")
    assert main(["verify", "check", str(model), "checksums.json"]) == 1
    assert "model.safetensors: found SHA-256" in capsys.readouterr().err
    assert main(["verify", "generate", str(model)]) == 1
    assert "checksums.json exists" in capsys.readouterr().err
    assert main(["verify", "generate", str(model), "--force", "-o", "checksums.json"]) == 0


def test_check_without_a_source_asks_the_models_origin(model, capsys) -> None:
    assert main(["verify", "check", str(model)]) == 1
    assert "nobody says checksums" in capsys.readouterr().err


@pytest.fixture
def damaged(model, tmp_path):
    """(model, manifest) that do not agree."""
    manifest = tmp_path / "m.json"
    assert main(["verify", "generate", str(model), "-o", str(manifest)]) == 0
    (model / "tokenizer.json").write_bytes(b"{}")
    return model, manifest


def test_nothing_starts_from_files_that_are_not_as_listed(damaged, capsys, monkeypatch) -> None:
    model, manifest = damaged
    monkeypatch.setattr("sapwood.app.serving.launch.print_stacks_on_signal", lambda: None)
    monkeypatch.setattr("sapwood.app.serving.launch.configure_logging", lambda _: None)
    config = EngineConfig.of({"model": str(model), "model_checksum": str(manifest)})
    with pytest.raises(IntegrityError, match=r"tokenizer\.json: found 2 bytes, expected"):
        serve(config, ServerConfig())
    with pytest.raises(IntegrityError, match=r"tokenizer\.json"):
        LLM(config=config)
    for command in (["pull", str(model)], ["check", "--model", str(model)]):
        assert main([*command, "--model-checksum", str(manifest)]) == 1
        assert "tokenizer.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model-checksum"], "origin"),
        (["--model-checksum", "m.json"], "m.json"),
        (["--model-checksum=org/name"], "org/name"),
        (["--model-checksum", "--revision", "main"], "origin"),
        ([], None),
    ],
)
def test_the_flag_alone_means_the_origin(arguments, expected, monkeypatch) -> None:
    seen = []
    monkeypatch.setattr(
        "sapwood.app.cli.pull.fetch_with_bar", lambda model: seen.append(model) or 1 / 0
    )
    CliRunner().invoke(cli, ["pull", *arguments])
    assert [model.model_checksum for model in seen] == [expected]
