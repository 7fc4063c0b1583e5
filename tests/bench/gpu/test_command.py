"""The whole command, tiny, on a CPU; transformers' continuous batching takes too long there."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.bench.cli import bench
from sapwood.bench.gpu import measure
from sapwood.bench.gpu.measure import VARIANTS, GpuBench
from sapwood.bench.gpu.options import GpuOptions
from sapwood.bench.gpu.shapes import shapes
from sapwood.bench.gpu.transformers_peer import open_transformers
from tests.bench.images import num_colours

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_quick_run_measures_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [shape, _] = shapes(quick=True)
    monkeypatch.setattr(measure, "shapes", lambda *, quick: [shape])
    done = CliRunner().invoke(
        bench,
        ["gpu", "--device", "cpu", "--quick", "--no-peers", "--output-dir", str(tmp_path)],
        catch_exceptions=False,
    )
    assert done.exit_code == 0, done.output
    assert "its figures say nothing about speed" in done.output
    assert "left out" not in done.output
    [path] = tmp_path.glob("gpu-quick-*.json")
    report = json.loads(path.read_text())["report"]
    found = {(one["model"], one["what"], one["variant"]) for one in report["figures"]}
    for variant in VARIANTS:
        for what in ("single-stream decode", "prefill of 31", "idle at 4 running"):
            assert (shape.name, what, variant) in found
    assert (shape.name, "6 requests, 8 + 8", measure.BEST) in found
    assert all(one["value"] > 0 for one in report["figures"])
    assert num_colours(path.with_suffix(".png")) > 0


def test_transformers_on_the_same_shape() -> None:
    [_, llama] = shapes(quick=True)
    with open_transformers(llama, CPU, torch.float32) as peer:
        assert peer.decode_s(5, 3) > 0


def test_parts_that_fail_or_come_too_late_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(measure, "run_checks", lambda *_: [])
    monkeypatch.setattr(measure, "measure_limits", fail)
    monkeypatch.setattr(measure, "shapes", lambda *, quick: [])
    options = GpuOptions(device="cpu", quick=True)
    report = GpuBench(options, Console(quiet=True)).run()
    assert report.left_out == ["limits: RuntimeError: out of memory"]
    monkeypatch.undo()
    late = GpuOptions(device="cpu", quick=True, budget=1e-9)
    report = GpuBench(late, Console(quiet=True)).run()
    assert len(report.left_out) == 12
    assert report.left_out[0].startswith("kernel checks: ")


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(ConfigError, match=r"--device is cuda, but .* or use --device cpu"):
        GpuBench(GpuOptions(), Console(quiet=True))
    with pytest.raises(ConfigError, match="with --quick it runs a tiny version"):
        GpuBench(GpuOptions(device="cpu"), Console(quiet=True))
    with pytest.raises(ConfigError, match="--budget is 0"):
        GpuOptions(budget=0.0)
