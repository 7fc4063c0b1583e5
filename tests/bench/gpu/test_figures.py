from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sapwood.bench.gpu.idle import idle_share, measure_idle
from sapwood.bench.gpu.limits import measure_limits
from sapwood.bench.gpu.shapes import Shape, shapes

CPU = torch.device("cpu")


def test_idle_is_what_no_interval_covers() -> None:
    assert idle_share([(0, 1)]) == 0.0
    assert idle_share([(3, 4), (0, 1)]) == pytest.approx(0.5)
    assert idle_share([(0, 4), (1, 2), (3, 6), (9, 10)]) == pytest.approx(0.3)


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 9)), min_size=1))
def test_idle_counts_every_moment_once(spans: list[tuple[int, int]]) -> None:
    covered = {moment for start, length in spans for moment in range(start, start + length)}
    whole = max(covered) + 1 - min(covered)
    share = idle_share([(start, start + length) for start, length in spans])
    assert share == pytest.approx(1 - len(covered) / whole)


def test_idle_of_nothing_cannot_be_said() -> None:
    for nothing in ([], [(1.0, 1.0)]):
        with pytest.raises(ValueError, match=r"nothing ran|took no time"):
            idle_share(nothing)


def test_the_profiler_sees_what_runs() -> None:
    x = torch.randn(200, 200)
    busy = measure_idle(lambda: [x @ x for _ in range(20)] and None, CPU)
    assert 0.0 <= busy < 1.0


def test_limits_are_measured() -> None:
    limits = measure_limits(CPU, quick=True)
    assert limits.copy_bytes_s > 1e7
    assert limits.flop_s > 1e6


def by_name(*, quick: bool = False) -> dict[str, Shape]:
    return {shape.name: shape for shape in shapes(quick=quick)}


LLAMA = 8_030_261_248 - 65 * 4096
"""Its published size without its norms, which are not counted."""


def test_the_shapes_are_those_of_the_published_models() -> None:
    sizes = {name: shape.decoder.num_parameters for name, shape in by_name().items()}
    assert sizes == {"Qwen3-0.6B": 596_049_920 - 57 * 1024 - 56 * 128, "Llama-3-8B": LLAMA}
    assert all(one.decoder.num_parameters < 200_000 for one in by_name(quick=True).values())


def test_bytes_and_operations_of_a_step() -> None:
    llama = by_name()["Llama-3-8B"]
    without_embedding = LLAMA - 128_256 * 4096
    assert llama.bytes_per_step(context=0, dtype_bytes=2) == 2 * without_embedding
    kv = llama.bytes_per_step(context=100, dtype_bytes=2) - 2 * without_embedding
    assert kv == 100 * 131_072
    # 6.98e9 weights in matrices; of scores and sums half of 4 * 32 * 4096 * n^2.
    matrices = LLAMA - 2 * 128_256 * 4096
    assert llama.flop_of_prefill(1000) == 2 * matrices * 1000 + 2 * 32 * 4096 * 1000**2
