"""What configuration decided where the user left a choice."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Decision:
    option: str
    value: object
    reason: str

    def __str__(self) -> str:
        return f"{self.option} = {self.value} ({self.reason})"
