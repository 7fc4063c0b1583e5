"""Plots how many tokens a step with guesses brings, from a run with SmolLM2.

    python -m tests.docs.accept_length [--to docs/images/accept-length.png]

It takes about a minute, on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sapwood import LLM

PICTURE = Path(__file__).parents[2] / "docs" / "images" / "accept-length.png"

MODEL, NUM_TOKENS, SPAN, DPI = "smollm2-135m", 96, 12, 110
NAMES = ("count", "total", "items", "index", "buffer", "value", "node", "width", "score", "queue")
CODE = """def {0}_of(values):
    {0} = 0
    for value in values:
        if value > 10:
            {0} = {0} + value
        else:
            {0} = {0} - 1
    print('done', {0})
    return {0}
"""
EDITS = [
    f"Rewrite this code with the name `{name}` changed to `{name}_new`. Answer with the code "
    f"only.\n\n```\n{CODE.format(name)}```"
    for name in NAMES
]
CHATS = [
    "What is the capital of France and what is it known for?",
    "Give me three tips for better sleep.",
    "Explain how rain forms.",
    "How do I cook rice?",
    "Why is the sky blue?",
    "How does a bicycle stay upright?",
    "What should I pack for a week in the mountains?",
    "Explain supply and demand to a child.",
    "What makes bread rise?",
    "How do vaccines work?",
]
NGRAM = {"speculative_algorithm": "NGRAM", "disable_speculative_adaptation": True}
ITSELF = {
    "speculative_algorithm": "STANDALONE",
    "speculative_draft_model_path": MODEL,
    "speculative_draft_model_quantization": "w4a8",
    "disable_speculative_adaptation": True,
}
RUNS = (
    ("NGRAM, edits", NGRAM, EDITS),
    ("NGRAM, chats", NGRAM, CHATS),
    ("itself in 4 bits with 3 guesses, chats", ITSELF, CHATS),
)
Step = tuple[int, int]
"""(output tokens before a step, tokens that it brought)"""


def run(options: dict[str, Any], prompts: Sequence[str]) -> list[Step]:
    """All steps that brought tokens, each prompt alone."""
    steps: list[Step] = []
    with LLM(MODEL, dtype="bfloat16", max_total_tokens=4096, **options) as llm:
        for prompt in prompts:
            before = 0
            asked = {"temperature": 0, "max_new_tokens": NUM_TOKENS}
            for chunk in llm.stream_chat([{"role": "user", "content": prompt}], asked):
                if chunk.token_ids:
                    steps.append((before, len(chunk.token_ids)))
                    before += len(chunk.token_ids)
        speculated = llm.stats().speculated
        assert speculated is not None
        # A reader that falls behind gets several steps as one chunk.
        if len(steps) < speculated.num_steps:
            sys.exit(
                f"{speculated.num_steps} steps came in {len(steps)} chunks, since this process was "
                "too slow; run it while nothing else runs"
            )
    return steps


def draw(runs: Sequence[tuple[str, list[Step]]], path: Path) -> None:
    """Left: the mean by place in the output; right: which share of all tokens came in steps with at
    least so many.

    runs  (label, steps)"""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    FigureCanvasAgg(figure)
    by_place, shares = figure.add_subplot(1, 2, 1), figure.add_subplot(1, 2, 2)
    for label, steps in runs:
        mean = sum(count for _, count in steps) / len(steps)
        means = []
        for start in range(0, NUM_TOKENS, SPAN):
            counts = [count for before, count in steps if start <= before < start + SPAN]
            means.append(sum(counts) / len(counts) if counts else float("nan"))
        by_place.plot(range(0, NUM_TOKENS, SPAN), means, marker="o", label=f"{label}: {mean:.2f}")
        longest = max(count for _, count in steps)
        tokens = sum(count for _, count in steps)
        reached = [
            sum(count for _, count in steps if count >= least) / tokens
            for least in range(1, longest + 1)
        ]
        shares.plot(range(1, longest + 1), reached, marker=".", label=label)
    by_place.set(xlabel="output tokens before the step", ylabel="tokens per step")
    by_place.legend()
    shares.set(xlabel="tokens of a step", ylabel="share of tokens from steps with at least as many")
    figure.savefig(path, dpi=DPI)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--to", type=Path, default=PICTURE)
    path = parser.parse_args().to
    found = [(label, run(options, prompts)) for label, options, prompts in RUNS]
    for label, steps in found:
        tokens = sum(count for _, count in steps)
        sys.stdout.write(f"{label}: {tokens} tokens in {len(steps)} steps\n")
    draw(found, path)


if __name__ == "__main__":
    main()
