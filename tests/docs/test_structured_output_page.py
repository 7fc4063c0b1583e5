"""The extraction to a pydantic model, as a reader would run it."""

from __future__ import annotations

import pytest

from sapwood.store import ModelFiles
from tests.docs.test_docs import ROOT, blocks


def test_the_extraction_runs(smollm2_files: ModelFiles, capsys: pytest.CaptureFixture[str]) -> None:
    page = ROOT / "docs" / "structured-output.md"
    source = next(one.text for one in blocks(page.read_text("utf-8")) if "with LLM(" in one.text)
    names: dict[str, object] = {"__name__": "docs"}
    exec(compile(source, str(page), "exec"), names)
    assert names["result"].text.startswith("{")  # type: ignore[attr-defined]
    if names["result"].finish.kind == "stop":  # type: ignore[attr-defined]
        assert capsys.readouterr().out.strip()
