"""The conformance suite: every op of a kernel implementation beside the reference, on its device.

Tests, `sapwood kernels test` and `sapwood bench gpu` run the same checks. A package that brings
kernels for other hardware runs them, too (docs/hardware.md).
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from sapwood.kernels.conformance import attention, products, rows, sampling, states
from sapwood.kernels.conformance.checks import LIMITS, Case, CheckResult, Checks, difference
from sapwood.kernels.interface import Kernels

CHECKS = Checks(
    {**rows.CHECKS, **attention.CHECKS, **products.CHECKS, **sampling.CHECKS, **states.CHECKS}
)


@torch.inference_mode()
def run_checks(
    kernels: Kernels, reference: Kernels, cases: Sequence[Case], names: Iterable[str] = ()
) -> Iterator[CheckResult]:
    """Run every check, or those in `names`, on every case. An exception is a failed check."""
    for name in names or CHECKS:
        function, limit = CHECKS[name]
        for case in cases:
            start_s, error, failure = time.perf_counter(), 0.0, ""
            try:
                pairs = list(function(case, kernels, reference))
                error = max((difference(got, wanted) for got, wanted in pairs), default=0.0)
            except Exception as raised:  # noqa: BLE001 - one kernel's failure must not hide others
                failure = f"{type(raised).__name__}: {raised}"
            yield CheckResult(
                name=name,
                case=str(case),
                error=error,
                limit=LIMITS[case.dtype] if limit is None else max(limit, LIMITS[case.dtype]),
                seconds=time.perf_counter() - start_s,
                failure=failure,
            )
