"""What a plan says of memory: the estimates are above what is measured, and not far above."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sapwood.app.painting import loading
from sapwood.app.painting.loading import plan_painting
from sapwood.app.painting.memory import TRANSFORMER_WIDTHS, VAE_WIDTHS, picture_shape
from sapwood.diffusion.memory import PictureMemory
from sapwood.schema.config.painting import PaintingConfig
from tests.painting_models import flux, saved, stable_diffusion

MEASURE = """
import json, threading, time
from pathlib import Path
import psutil, torch
from sapwood.layers.axial_rope import grid
from sapwood.models.dit.flux import FluxTransformer
from sapwood.models.dit.rows import DenoisingRow
from sapwood.models.loader.assign import load_weights
from sapwood.models.vae.kl import AutoencoderKL
from sapwood.pipelines.components import ComponentFolder

build = ComponentFolder(path=Path("."), index={}).build(torch.float32)

def filled(model):
    load_weights(model, ((n, torch.zeros(tuple(t.shape))) for n, t in model.targets().items()))
    return model

def most(work):
    process, going = psutil.Process(), True
    start = top = process.memory_info().rss
    def watch():
        nonlocal top
        while going:
            top = max(top, process.memory_info().rss)
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    work()
    going = False
    watcher.join()
    return top - start

heads = {"num_attention_heads": 8, "attention_head_dim": 128, "in_channels": 64}
layers = {"num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 64,
          "pooled_projection_dim": 64}
flux = filled(FluxTransformer({**heads, **layers}, build))
vae = filled(AutoencoderKL({"block_out_channels": [64, 128], "latent_channels": 4}, build))
side, texts = 40, 64
positions = torch.cat((torch.zeros(side * side, 1).long(), grid(side, side)), 1)
row = DenoisingRow(
    latents=torch.randn(side * side, 64), text=torch.randn(texts, 64), timestep=1.0,
    rotations=flux.rotations(texts, positions), pooled=torch.randn(64), num_wanted=side * side,
)
with torch.inference_mode():
    step = most(lambda: flux([row])) / (side * side + texts) / 1024 / 4
    decode = most(lambda: vae.decode(torch.randn(1, 4, 192, 192))) / 384**2 / 64 / 4
print(json.dumps([step, decode]))
"""


def test_the_estimates_are_above_what_is_measured():
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    step, decode = json.loads(done.stdout.splitlines()[-1])
    assert TRANSFORMER_WIDTHS / 4 < step < TRANSFORMER_WIDTHS
    assert VAE_WIDTHS / 4 < decode < VAE_WIDTHS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(flux(), tmp_path_factory.mktemp("models") / "flux")


def plan_with(
    monkeypatch: pytest.MonkeyPatch, folder: Path, free: int, **options: Any
) -> loading.PaintingPlan:
    monkeypatch.setattr(loading, "device_memory", lambda device, platform: (free, free))
    return plan_painting(str(folder), PaintingConfig(**options))


def test_the_plan_says_what_fits_and_what_each_precision_costs(monkeypatch, folder):
    plan = plan_with(monkeypatch, folder, 4 * 10**9)
    assert plan.problem is None
    notes = "\n".join(plan.notes)
    for part in ("all weights would take", "in bf16", "fp8", "a step of one pass", "--vae-tiling)"):
        assert part in notes
    assert plan.memory is not None
    weights = plan.folder.num_bytes
    left = 4 * 10**9 - weights - 256 * 2**20
    assert plan.memory.free_bytes == int(left * 0.9)
    assert f"pictures of up to {min(plan.memory.max_pixels, 4 * 2**20)} pixels" in notes


def test_tokens_of_a_step_are_as_many_as_fit(monkeypatch, folder):
    shape = picture_shape(plan_with(monkeypatch, folder, 4 * 10**9).folder)
    assert shape is not None
    room = 300 * 2**20
    weights = plan_with(monkeypatch, folder, 4 * 10**9).folder.num_bytes
    plan = plan_with(monkeypatch, folder, weights + 256 * 2**20 + room)
    assert plan.limits.max_step_tokens == min(16384, int(room * 0.9) // shape.bytes_per_token)


def test_no_room_for_a_small_picture_is_a_problem_at_start(monkeypatch, folder):
    weights = plan_with(monkeypatch, folder, 4 * 10**9).folder.num_bytes
    plan = plan_with(monkeypatch, folder, weights + 256 * 2**20 + 1000)
    assert plan.problem is not None
    assert "256x256" in plan.problem
    assert "--vae-precision bf16" in plan.problem


def test_weights_that_do_not_fit_are_a_problem_at_start(monkeypatch, folder):
    plan = plan_with(monkeypatch, folder, 10)
    assert str(plan.problem).startswith("the weights take")


def test_a_unet_counts_latents_as_tokens(tmp_path):
    found = plan_painting(
        str(saved(stable_diffusion(), tmp_path / "sd")), PaintingConfig(vae_tiling=True)
    )
    memory = found.memory
    assert isinstance(memory, PictureMemory)
    assert memory.piece_pixels is not None
    assert memory.pixels_per_token == 4, "two levels of the autoencoder: 2x2 pixels per latent"
