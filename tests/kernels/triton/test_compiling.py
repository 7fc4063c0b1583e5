"""The interpreter takes more than the compiler does: every kernel is compiled, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import long_only

ROOT = Path(__file__).parents[3]
KERNELS = {
    "_rms_norm", "_layer_norm", "_carry_rows", "_activate", "_activate_and_mul", "_embedding",
    "_qk_norm_rope_write_kv", "_largest_of_split", "_largest_of_splits", "_mask_logits",
    "_penalise", "_measure", "_list_bracket", "_choose", "_round", "_scaled_matmul",
    "_grouped_matmul", "_outputs", "_new_states", "_dense_experts", "_coded_experts",
    "_scan", "_delta_chunks", "_state_chunks", "_gated_rms_norm", "_shrink", "_expand",
    "_latent_attention", "_index_scores", "_choose_keys", "merge_kernel",
}  # fmt: skip
SHARED_BYTES = 227 * 1024
"""What a block of threads may have on an H200."""


@pytest.mark.parametrize("options", [[], *long_only(["--all-sizes"])], ids=" ".join)
def test_every_kernel_compiles_for_the_h200(options: list[str]) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.triton.compile_ops_for_h200", *options],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    compiled = [json.loads(line) for line in done.stdout.splitlines()]
    assert {one["name"] for one in compiled} == KERNELS
    assert all(one["shared"] <= SHARED_BYTES for one in compiled)
