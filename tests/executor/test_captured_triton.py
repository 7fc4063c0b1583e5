"""Captured steps with Triton's kernels, in the interpreter: launches are recorded as a GPU records
them. They give what the models give op by op with torch."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed (extra: gpu)")

from sapwood.kernels.triton.ops import TritonKernels
from tests.executor.captured_walk import Walk
from tests.executor.recording_capture import RecordingCapture
from tests.executor.triton_launches import note_launches

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # the interpreter's numpy

KINDS = {
    "gemma3": "decode_kernel",
    "gpt_oss": "_dense_experts",
    "lfm2": "_new_states",
    "qwen3_next": "_delta_chunks",
    "bamba": "_state_chunks",
    "deepseek_v2": "_latent_attention",
    "deepseek_v32, few keys": "_choose_keys",
}
"""Cases, and a kernel that each of them launches."""

STEPS = [[5, 1], [1, 1], [1, 0], [2, 1], [1, 1]]


@pytest.mark.parametrize("case", KINDS)
def test_replays_give_what_the_ops_give(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = RecordingCapture()
    assert KINDS[case] in note_launches(monkeypatch, recorder)
    walk = Walk(case, TritonKernels(), decode=(2,), prefill=(8,), num_rows=2, recorder=recorder)
    replayed = [walk.step(step) for step in STEPS]
    assert all(replayed)
    walk.check_caches()
