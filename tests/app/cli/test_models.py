from __future__ import annotations

from click.testing import CliRunner

from sapwood.app.cli.main import cli


def test_models_are_listed_with_what_works_for_them() -> None:
    result = CliRunner().invoke(cli, ["models"])
    assert result.exit_code == 0
    header, *rows = result.stdout.splitlines()
    assert " ".join(header.split()) == (
        "ARCHITECTURE MODELS GGUF ONE CALL PER STEP CONVERT PICTURES"
    )
    gemma3 = next(row for row in rows if row.startswith("Gemma3ForCausalLM"))
    assert " ".join(gemma3.split()) == "Gemma3ForCausalLM Gemma 3 gemma3 yes yes -"
