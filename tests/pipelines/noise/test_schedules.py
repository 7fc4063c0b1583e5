"""Every step of our noise schedules against diffusers' schedulers."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from torch import Tensor

from sapwood.base.errors import ConfigError, InvalidRequest
from sapwood.pipelines.interface import Schedule
from sapwood.pipelines.noise.flow_match import FlowMatchSchedule, shift_by_tokens
from sapwood.pipelines.noise.registry import schedule_class

# diffusers' own, where it hands numbers from torch to numpy.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SD: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SPACINGS = [
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
    {"timestep_spacing": "linspace"},
]
V, ZERO = {"prediction_type": "v_prediction"}, {"rescale_betas_zero_snr": True}
KARRAS = {"use_karras_sigmas": True}
DPM, UNI = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
EULER, ANCESTRAL = "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler"
CASES: list[tuple[str, dict[str, Any]]] = [
    *[("DDIMScheduler", fields | {"clip_sample": False}) for fields in SPACINGS],
    ("DDIMScheduler", {"set_alpha_to_one": False, "clip_sample": True, "clip_sample_range": 2.0}),
    ("DDIMScheduler", V | ZERO | {"timestep_spacing": "trailing", "clip_sample": False}),
    ("DDIMScheduler", {"prediction_type": "sample", "clip_sample": False}),
    *[("PNDMScheduler", fields | {"skip_prk_steps": True}) for fields in SPACINGS],
    ("PNDMScheduler", V | {"skip_prk_steps": True, "set_alpha_to_one": True}),
    *[(name, fields) for name in (EULER, ANCESTRAL) for fields in SPACINGS],
    (EULER, KARRAS),
    (EULER, V | ZERO | {"timestep_spacing": "trailing"}),
    (EULER, {"final_sigmas_type": "sigma_min"}),
    (ANCESTRAL, V),
    *[(name, fields) for name in (DPM, UNI) for fields in SPACINGS],
    *[(name, fields) for name in (DPM, UNI) for fields in (KARRAS, V, {"solver_order": 1})],
    (DPM, {"solver_type": "heun"}),
    (DPM, {"algorithm_type": "sde-dpmsolver++"}),
    (DPM, {"algorithm_type": "sde-dpmsolver++", **KARRAS}),
    (DPM, {"euler_at_final": True, "final_sigmas_type": "sigma_min", "lower_order_final": False}),
    (DPM, {"beta_schedule": "squaredcos_cap_v2", "beta_start": 0.0001, "beta_end": 0.02}),
    (UNI, {"solver_type": "bh1", "final_sigmas_type": "sigma_min"}),
    (UNI, {"solver_order": 3}),
    (UNI, {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
    ("LCMScheduler", {}),
    ("LCMScheduler", V | {"clip_sample": True}),
]


def predicted(sample: Tensor, index: int) -> Tensor:
    """Some function of the sample, so that mistakes grow."""
    return torch.sin(sample * 1.3 + index) * 0.8


def drawer(seed: int) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator, dtype=like.dtype)


def run(schedule: Schedule, start: Tensor) -> list[Tensor]:
    latents, draw, found = start, drawer(7), []
    for index in range(len(schedule.timesteps)):
        output = predicted(schedule.scaled(latents, index), index)
        latents = schedule.step(latents, output, index, draw)
        found.append(latents)
    return found


def run_peer(peer: Any, timesteps: Tensor, start: Tensor) -> list[Tensor]:
    takes_noise = "generator" in peer.step.__code__.co_varnames
    more = {"generator": torch.Generator().manual_seed(7)} if takes_noise else {}
    latents, found = start, []
    for index, timestep in enumerate(timesteps):
        scaled = latents
        if hasattr(peer, "scale_model_input"):
            scaled = peer.scale_model_input(latents, timestep)
        latents = peer.step(predicted(scaled, index), timestep, latents, **more).prev_sample
        found.append(latents)
    return found


def assert_equal(got: list[Tensor], want: list[Tensor]) -> None:
    assert len(got) == len(want)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("num_steps", [1, 4, 23])
@pytest.mark.parametrize(
    ("name", "fields"), CASES, ids=lambda part: part if isinstance(part, str) else str(part)
)
def test_each_step_equals_diffusers(name: str, fields: dict[str, Any], num_steps: int) -> None:
    peer = getattr(diffusers, name)(**(SD | fields))
    config = dict(peer.config) | {"_class_name": name}
    if name == "PNDMScheduler" and num_steps == 1:  # diffusers fails while it draws
        with pytest.raises(InvalidRequest, match="at least 2"):
            schedule_class(config)(config, num_steps)
        return
    peer.set_timesteps(num_steps)
    ours = schedule_class(config)(config, num_steps)
    np.testing.assert_allclose(ours.timesteps, peer.timesteps.numpy(), atol=1e-3)
    assert ours.initial_scale == pytest.approx(float(peer.init_noise_sigma), rel=1e-5)
    start = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    start = start * ours.initial_scale
    assert_equal(run(ours, start), run_peer(peer, peer.timesteps, start))


@pytest.mark.parametrize("name", ["DDIMScheduler", EULER, ANCESTRAL, DPM, UNI, "LCMScheduler"])
def test_the_last_steps_of_a_picture_with_noise_equal_diffusers(name: str) -> None:
    peer = getattr(diffusers, name)(**SD)
    peer.set_timesteps(10)
    config = dict(peer.config) | {"_class_name": name}
    ours = schedule_class(config)(config, 10, strength=0.65)
    timesteps = peer.timesteps[4:]
    assert ours.timesteps == pytest.approx(timesteps.tolist(), abs=1e-3)
    if hasattr(peer, "set_begin_index"):
        peer.set_begin_index(4)
    picture, noise = (torch.randn(2, 4, 5, 3, generator=torch.Generator().manual_seed(1))).split(1)
    start = ours.noised(picture, noise, 0)
    torch.testing.assert_close(start, peer.add_noise(picture, noise, timesteps[:1]))
    assert_equal(run(ours, start), run_peer(peer, timesteps, start))


@pytest.mark.parametrize(
    "fields",
    [
        {"shift": 3.0},
        {"use_dynamic_shifting": True},
        {"use_dynamic_shifting": True, "time_shift_type": "linear"},
        {"use_dynamic_shifting": True, "shift_terminal": 0.02},
        {"shift": 3.0, "stochastic_sampling": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("gives_sigmas", [True, False])
def test_flow_matching_equals_diffusers(fields: dict[str, Any], gives_sigmas: bool) -> None:
    peer = diffusers.FlowMatchEulerDiscreteScheduler(**fields)
    mu = shift_by_tokens(peer.config, 1000) if "use_dynamic_shifting" in fields else None
    sigmas = np.linspace(1.0, 1 / 7, 7) if gives_sigmas else None
    peer.set_timesteps(7, sigmas=sigmas, mu=mu)
    ours = FlowMatchSchedule(peer.config, sigmas=sigmas, num_steps=7, mu=mu)
    assert ours.timesteps == pytest.approx(peer.timesteps.tolist(), rel=1e-5)
    start = torch.randn(1, 4, 5, 3, generator=torch.Generator().manual_seed(1))
    assert_equal(run(ours, start), run_peer(peer, peer.timesteps, start))


def test_what_nobody_wrote_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"HeunDiscreteScheduler.*known: DDIM"):
        schedule_class({"_class_name": "HeunDiscreteScheduler"})
    make = schedule_class({"_class_name": "DDIMScheduler"})
    with pytest.raises(ConfigError, match="thresholding"):
        make({"thresholding": True}, 4)
    with pytest.raises(InvalidRequest, match="at most 1000"):
        make({}, 1001)
    with pytest.raises(InvalidRequest, match="leaves none"):
        make({}, 4, strength=0.1)
