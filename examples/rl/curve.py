"""Draws what train.py has written: the mean reward of each step, and its running mean.

python examples/rl/curve.py curve.json curve.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

RUNNING = 10


def running_mean(values: list[float], size: int = RUNNING) -> list[float]:
    """The mean of each value and of those before it, `size` at most."""
    return [
        sum(values[max(0, end - size) : end]) / len(values[max(0, end - size) : end])
        for end in range(1, len(values) + 1)
    ]


def draw(steps: list[dict[str, Any]], path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 4.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    numbers = [step["step"] for step in steps]
    rewards = [step["reward"] for step in steps]
    for way, marker in (("disk", "o"), ("tensor", "s"), ("group", "^")):
        chosen = [step for step in steps if step["way"] == way]
        axes.plot(
            [step["step"] for step in chosen],
            [step["reward"] for step in chosen],
            marker,
            markersize=4,
            alpha=0.5,
            label=f"weights sent after this step: {way}",
        )
    axes.plot(numbers, running_mean(rewards), label=f"mean of the last {RUNNING} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("mean reward")
    axes.set_ylim(0.0, 1.0)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
