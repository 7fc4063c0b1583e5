"""The evaluations by name."""

from __future__ import annotations

from sapwood.base.registry import Registry
from sapwood.bench.evals.questions import Task

EVALS: Registry[type[Task]] = Registry(
    "evaluation",
    {
        "aime25": "sapwood.bench.evals.numbers:Aime",
        "gpqa": "sapwood.bench.evals.choices:Gpqa",
        "gsm8k": "sapwood.bench.evals.numbers:Gsm8k",
        "humaneval": "sapwood.bench.evals.programs:HumanEval",
        "mgsm": "sapwood.bench.evals.numbers:Mgsm",
        "mmlu": "sapwood.bench.evals.choices:Mmlu",
        "mmmu": "sapwood.bench.evals.pictures:Mmmu",
    },
    entry_point="sapwood.evaluations",
)
"""SGLang's names; another package adds one by an entry point."""

RUNS_PROGRAMS = frozenset({"humaneval"})
"""Evaluations that run what the model writes."""
