from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from sapwood.base.errors import ConfigError
from sapwood.bench.ops.cases import all_cases
from sapwood.bench.ops.limits import Limits
from sapwood.bench.ops.measure import bench_ops, measure_ops
from sapwood.bench.ops.options import DENSE, MIXTURE, SHAPES, OpsOptions, Shape
from sapwood.bench.report import OutputOptions
from sapwood.kernels.kv_cache import DTYPES
from sapwood.kernels.latent import LatentSizes
from sapwood.kernels.reference import ReferenceKernels

NAME = "qwen3-0.6b"
TINY = Shape(hidden=64, inner=96, num_heads=4, num_kv_heads=2, head_dim=16, vocab=320)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.bench.ops.cases.COLD_BYTES", 1 << 16)
    monkeypatch.setattr("sapwood.bench.ops.limits.READ_BYTES", 1 << 20)
    monkeypatch.setattr("sapwood.bench.ops.limits.MATRIX_ROWS", 32)
    monkeypatch.setitem(SHAPES, NAME, TINY)


def options(**changes: object) -> OpsOptions:
    given = {"rows": "1,80", "context": 24, "seconds": 1e-6, "num_threads": 1, **changes}
    return OpsOptions(shape=NAME, **given)


def test_every_case_can_be_called_by_the_reference(small: None) -> None:
    kernels = ReferenceKernels()
    ops = set()
    for case in all_cases(TINY, [2, 80], 24, DTYPES["float32"]):
        case.make(kernels)()
        assert case.num_bytes > 0
        ops.add(case.op)
    assert {"rms_norm", "linear float32", "linear q4_1", "attention, decode", "argmax"} <= ops


def test_models_with_latent_rows_have_their_own_attention(small: None) -> None:
    sizes = LatentSizes(num_heads=4, rank=32, rope_dim=8, nope_dim=16, value_dim=16)
    shape = replace(TINY, latent=sizes)
    cases = [case for case in all_cases(shape, [2, 80], 24, DTYPES["bfloat16"]) if "att" in case.op]
    assert [case.op for case in cases] == [
        f"latent attention, decode {kind}" for kind in ("bfloat16", "int8")
    ]
    for case in cases:
        case.make(ReferenceKernels())()
    queries = 2 * 4 * 40 * 2
    assert [case.num_bytes - queries for case in cases] == [2 * 24 * 40 * 2, 2 * 24 * 42]


def test_a_run_writes_what_it_shows(small: None, tmp_path: Path) -> None:
    console = Console(file=io.StringIO(), width=60)
    bench_ops(options(dtype="float32"), OutputOptions(output_dir=str(tmp_path)), console)
    [written] = tmp_path.glob("*.json")
    ops = json.loads(written.read_text())["ops"]
    shown = console.file.getvalue()
    assert all(one["op"] in shown and one["setting"] in shown for one in ops)
    assert written.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_ops_are_chosen_by_the_beginning_of_their_names(small: None) -> None:
    _, costs = measure_ops(options(ops="linear, argmax"), show_progress=False)
    assert {cost.op.split()[0] for cost in costs} == {"linear", "argmax"}
    with pytest.raises(ConfigError, match="--ops"):
        measure_ops(options(ops="softmax"), show_progress=False)


def test_experts_are_measured_in_the_sizes_of_a_mixture(
    small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert OpsOptions().shape_name == DENSE
    asked = OpsOptions(ops="experts", rows="1,70", seconds=1e-6, num_threads=1, dtype="float32")
    assert asked.shape_name == MIXTURE
    monkeypatch.setitem(SHAPES, MIXTURE, replace(TINY, num_experts=5, num_chosen=2))
    _, costs = measure_ops(asked, show_progress=False)
    assert len(costs) == 8
    assert {cost.op for cost in costs} == {
        f"experts {k}" for k in ("float32", "int8", "q8_0", "q4_1")
    }
    one, many = (cost for cost in costs if cost.op == "experts float32")
    # One token reads only the experts that it chose, and 70 read each of them once.
    weights = 3 * TINY.hidden * TINY.inner * 4
    assert one.num_bytes == 2 * weights + 2 * TINY.hidden * 4
    assert many.num_bytes == 5 * weights + 2 * 70 * TINY.hidden * 4
    assert many.num_operations == 2 * 70 * 2 * 3 * TINY.hidden * TINY.inner
    with pytest.raises(ConfigError, match=f"no op of {DENSE}"):
        measure_ops(OpsOptions(shape=DENSE, ops="experts"), show_progress=False)


def test_the_limit_is_that_of_memory_or_of_the_processor() -> None:
    limits = Limits(bandwidth=10.0, rate=100.0)
    assert limits.seconds(50, 100) == 5.0
    assert limits.seconds(5, 1000) == 10.0


@pytest.mark.parametrize("rows", ["", "0", "1,x", "-1"])
def test_rows_must_be_numbers(rows: str) -> None:
    with pytest.raises(ConfigError, match="--rows"):
        OpsOptions(rows=rows)
