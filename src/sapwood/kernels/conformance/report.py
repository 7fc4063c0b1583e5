"""The results of checks for people."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from sapwood.kernels.conformance.checks import CheckResult


def check_table(title: str, checks: Sequence[CheckResult]) -> Table:
    """A table with a row per check: its largest error, or its failure."""
    table = Table("check", "cases", "largest error", "limit", "verdict")
    table.title = title
    for name in dict.fromkeys(one.name for one in checks):
        of_name = [one for one in checks if one.name == name]
        failed = [one for one in of_name if not one.passed]
        worst = max(of_name, key=lambda one: one.error / one.limit)
        verdict = "passed"
        if failed:
            verdict = f"FAILED: {failed[0].case}: {failed[0].failure or 'differs'}"
        table.add_row(name, str(len(of_name)), f"{worst.error:.1e}", f"{worst.limit:.0e}", verdict)
    return table
