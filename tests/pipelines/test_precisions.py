"""Every pipeline in 16 bits, and with a quantised transformer: near to the picture in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sapwood.layers.quantization import SCHEMES
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest, run_whole
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models

MAKERS: dict[str, Any] = {
    "flux": painting_models.flux,
    "qwen-image": painting_models.qwen_image,
    "z-image": painting_models.z_image,
    "sd 1.5": lambda: painting_models.stable_diffusion("DPMSolverMultistepScheduler"),
    "sd xl": painting_models.stable_diffusion_xl,
    "sd 3.5": painting_models.stable_diffusion_3,
}
REQUEST = PictureRequest(
    prompt="a red fox",
    height=32,
    width=48,
    num_inference_steps=3,
    seed=5,
)
BF16 = torch.bfloat16
CASES = {
    "bf16": (Precisions(dit=BF16, text_encoders=(BF16,), vae=BF16), 12.0),
    "bf16 transformer": (Precisions(dit=BF16), 12.0),
    "int8": (Precisions(dit_scheme=SCHEMES.get("w8a8_int8")()), 25.0),
}


@pytest.fixture(scope="module", params=MAKERS)
def drawn(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.Tensor]:
    peer = MAKERS[request.param]()
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("painting"))
    with torch.inference_mode():
        return folder, run_whole(load_pipeline(folder, Precisions()), REQUEST)


@pytest.mark.parametrize("case", CASES)
def test_the_picture_is_near(case: str, drawn: tuple[Path, torch.Tensor]) -> None:
    """Noise is drawn in the transformer's type, which rounds it: grey levels move a little."""
    precisions, most = CASES[case]
    folder, exact = drawn
    got = run_whole(load_pipeline(folder, precisions), REQUEST)
    assert got.shape == exact.shape
    difference = (got.float() - exact.float()).abs().mean().item()
    assert 0.0 < difference < most, difference
    other = exact.flip(0).float()
    assert (other - exact.float()).abs().mean().item() > 1.5 * difference
