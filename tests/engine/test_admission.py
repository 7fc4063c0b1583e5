from __future__ import annotations

import pytest

from sapwood.engine.admission import (
    INITIAL_RATIO,
    LEAST_RATIO,
    STEPS_TO_LEAST,
    OutputReserve,
)


def test_the_share_falls_to_its_least_and_stays() -> None:
    reserve = OutputReserve(1.0)
    assert reserve.ratio == INITIAL_RATIO
    ratios = []
    for _ in range(STEPS_TO_LEAST):
        reserve.after_step()
        ratios.append(reserve.ratio)
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-2] > LEAST_RATIO
    assert ratios[-1] == pytest.approx(LEAST_RATIO)
    reserve.after_step()
    assert reserve.ratio == pytest.approx(LEAST_RATIO)


def test_a_retraction_starts_anew() -> None:
    reserve = OutputReserve(1.0)
    for _ in range(100):
        reserve.after_step()
    reserve.after_retraction()
    assert reserve.ratio == INITIAL_RATIO


@pytest.mark.parametrize(
    ("conservativeness", "initial", "least"),
    [(0.0, 0.0, 0.0), (0.5, 0.35, 0.05), (10.0, 1.0, 1.0), (2.0, 1.0, 0.2)],
)
def test_conservativeness_scales_within_everything(
    conservativeness: float, initial: float, least: float
) -> None:
    reserve = OutputReserve(conservativeness)
    assert reserve.ratio == pytest.approx(initial)
    for _ in range(STEPS_TO_LEAST + 5):
        reserve.after_step()
    assert reserve.ratio == pytest.approx(least)
