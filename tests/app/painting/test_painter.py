"""`sapwood.Painter`, `DiffGenerator` and `sapwood paint` beside diffusers, on tiny pipelines."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

from sapwood.app.cli.paint import paint as paint_command
from sapwood.app.painting.loading import plan_painting
from sapwood.app.painting.painter import Painter
from sapwood.app.painting.sglang_names import DiffGenerator
from sapwood.base.errors import ConfigError, InvalidRequest, ModelSourceError, WeightError
from sapwood.schema.config.painting import PaintingConfig
from tests import painting_models

ASKED: dict[str, Any] = {"width": 64, "height": 48, "num_inference_steps": 3}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    where = tmp_path_factory.mktemp("models")
    made = {
        "flux": painting_models.flux,
        "sd": painting_models.stable_diffusion,
        "sd3": painting_models.stable_diffusion_3,
        "qwen": painting_models.qwen_image,
    }
    return {
        name: painting_models.saved(pipeline(), where / name) for name, pipeline in made.items()
    }


@pytest.fixture(scope="module")
def flux(folders: dict[str, Path]) -> Iterator[Painter]:
    with Painter(folders["flux"]) as painter:
        yield painter


def by_diffusers(folder: Path, prompt: str, seed: int, **asked: Any) -> np.ndarray:
    import diffusers

    peer: Any = diffusers.DiffusionPipeline
    pipeline = peer.from_pretrained(str(folder))
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    return np.array(pipeline(prompt, generator=generator, **asked).images[0])


def assert_same(ours: Image.Image, theirs: np.ndarray) -> None:
    """Within one grey level."""
    assert np.abs(np.array(ours).astype(int) - theirs.astype(int)).max() <= 1
    assert theirs.std() > 5, "a picture of one colour would prove nothing"


@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("sd", {"guidance_scale": 4.0, "negative_prompt": "ugly"}),
        ("sd3", {"guidance_scale": 4.0, "negative_prompt": "ugly"}),
        ("qwen", {"true_cfg_scale": 3.0, "negative_prompt": "ugly"}),
    ],
)
def test_pictures_with_two_passes_drawn_together_are_those_of_diffusers(
    folders: dict[str, Path], name: str, guidance: dict[str, Any]
) -> None:
    with Painter(folders[name]) as painter:
        assert painter.plan.backend == "sapwood"
        pictures = painter.paint("an oak", n=2, seed=7, **ASKED, **guidance)
    for place, picture in enumerate(pictures):
        want = by_diffusers(folders[name], "an oak", 7 + place, **ASKED, **guidance)
        assert_same(picture.image, want)


@pytest.mark.parametrize("backend", ["sapwood", "diffusers"])
def test_tiles_are_turned_on(folders: dict[str, Path], backend: str) -> None:
    """The autoencoder of the tiny pipeline has tiles of 64 pixels."""
    asked = {"width": 160, "height": 96, "num_inference_steps": 2, "seed": 7}
    pictures = []
    for vae_tiling in (False, True):
        with Painter(folders["sd"], backend=backend, vae_tiling=vae_tiling) as painter:
            pictures.append(np.array(painter.paint("an oak", **asked)[0].image))
    whole, tiled = pictures
    assert whole.shape == tiled.shape
    assert (whole != tiled).any(), "tiles know nothing of pixels outside of them"


def test_steps_are_told(flux: Painter) -> None:
    told: list[tuple[int, int]] = []
    flux.paint("an oak", n=2, seed=1, on_step=lambda *step: told.append(step), **ASKED)
    assert told[-1] == (6, 6)
    assert sorted(told) == told


def test_after_an_error_the_painter_draws_on(flux: Painter) -> None:
    with pytest.raises(InvalidRequest, match="too small"):
        flux.paint(["an oak", "a wood"], width=1, height=1)
    with pytest.raises(InvalidRequest, match="frog"):
        flux.paint("an oak", frog=1)
    assert len(flux.paint("an oak", n=20, seed=1, width=16, height=16, num_inference_steps=1)) == 20


def test_sglangs_class_answers_as_sglangs(folders: dict[str, Path], tmp_path: Path) -> None:
    with DiffGenerator.from_pretrained(model_path=str(folders["flux"]), num_gpus=1) as generator:
        result = generator.generate(
            {"prompt": "an oak", "seed": 7, "save_output": True, "output_path": str(tmp_path)},
            **ASKED,
        )
        assert result["size"] == (48, 64, 1)
        frames = generator.generate(prompt="an oak", seed=7, return_frames=True, **ASKED)
        assert np.array_equal(frames[0], result["frames"][0])
        assert np.array_equal(np.array(Image.open(tmp_path / "seed_7.png")), frames[0])
        with pytest.raises(InvalidRequest, match="num_frames"):
            generator.generate(prompt="an oak", num_frames=17)


def test_the_command_writes_pictures(folders: dict[str, Path], tmp_path: Path) -> None:
    flags = ["--width", "64", "--height", "48", "--num-inference-steps", "3", "--seed", "7"]
    arguments = [
        "an oak",
        "--model",
        str(folders["flux"]),
        "-o",
        str(tmp_path / "a.png"),
        "-n",
        "2",
    ]
    result = CliRunner().invoke(paint_command, [*arguments, *flags])
    assert result.exit_code == 0, result.output
    assert_same(Image.open(tmp_path / "a.png"), by_diffusers(folders["flux"], "an oak", 7, **ASKED))
    assert (tmp_path / "a-2.png").exists()


@pytest.mark.parametrize(
    ("output", "words"), [("a.bmp", ".png"), ("nowhere/a.png", "there is no folder")]
)
def test_the_command_looks_first_whether_it_can_write(
    folders: dict[str, Path], tmp_path: Path, output: str, words: str
) -> None:
    arguments = ["an oak", "--model", str(folders["flux"]), "-o", str(tmp_path / output)]
    result = CliRunner().invoke(paint_command, arguments)
    assert isinstance(result.exception, ConfigError)
    assert words in result.exception.message


# ---- through diffusers ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def through(folders: dict[str, Path]) -> Iterator[Painter]:
    with Painter(folders["sd"], backend="diffusers") as painter:
        yield painter


def test_diffusers_draws_its_own_picture_step_by_step(
    through: Painter, folders: dict[str, Path]
) -> None:
    assert through.plan.limits.max_running == 1
    told: list[tuple[int, int]] = []
    (first, second) = through.paint(
        "an oak", n=2, seed=7, on_step=lambda *step: told.append(step), **ASKED
    )
    assert {step for step, _ in told} == {1, 2, 3, 4, 5, 6}
    assert_same(first.image, by_diffusers(folders["sd"], "an oak", 7, **ASKED))
    assert_same(second.image, by_diffusers(folders["sd"], "an oak", 8, **ASKED))


def test_what_a_pipeline_of_diffusers_does_not_take_is_refused_by_name(through: Painter) -> None:
    with pytest.raises(InvalidRequest, match="StableDiffusionPipeline takes no true_cfg_scale"):
        through.paint("an oak", true_cfg_scale=2.0, **ASKED)
    with pytest.raises(InvalidRequest, match="of diffusers refuses the request"):
        through.paint("an oak", width=63, height=48, num_inference_steps=1)


def test_a_picture_that_is_given_up_leaves_no_thread(through: Painter) -> None:
    def give_up(step: int, num_steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        through.paint("an oak", seed=7, on_step=give_up, **ASKED)
    assert not [one for one in threading.enumerate() if one.name == "diffusers"]
    assert len(through.paint("an oak", seed=7, **ASKED)) == 1


# ---- folders -------------------------------------------------------------------------------------


def test_a_plan_says_what_each_component_takes(folders: dict[str, Path]) -> None:
    whole = plan_painting(str(folders["flux"]), PaintingConfig())
    half = plan_painting(
        str(folders["flux"]),
        PaintingConfig(dit_precision="bf16", text_encoder_precisions="bf16,auto"),
    )
    by_name = {each.name: each for each in half.folder.components}
    before = {each.name: each for each in whole.folder.components}
    assert by_name["transformer"].num_bytes * 2 == before["transformer"].num_bytes
    assert by_name["text_encoder"].precision == "bf16"
    assert by_name["text_encoder_2"].precision == by_name["vae"].precision == "fp32"
    weights = folders["flux"] / "vae" / "diffusion_pytorch_model.safetensors"
    assert by_name["vae"].file_bytes == weights.stat().st_size
    assert half.problem is None


def test_a_pipeline_that_nobody_wrote_goes_to_diffusers_and_says_so(tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "OakPipeline"}))
    plan = plan_painting(str(tmp_path), PaintingConfig())
    assert plan.backend == "diffusers"
    assert "sapwood has no OakPipeline" in plan.notes[0]
    with pytest.raises(ConfigError, match="OakPipeline"):
        plan_painting(str(tmp_path), PaintingConfig(backend="sapwood"))
    with pytest.raises((WeightError, ConfigError)):
        Painter(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff" * 8, b"\x02" + b"\0" * 7 + b"[]", b"\0" * 4])
def test_weights_that_are_none_are_refused_by_their_file(tmp_path: Path, content: bytes) -> None:
    index = {"_class_name": "FluxPipeline", "vae": ["diffusers", "AutoencoderKL"]}
    (tmp_path / "model_index.json").write_text(json.dumps(index))
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "x.safetensors").write_bytes(content)
    with pytest.raises(ModelSourceError, match=r"x\.safetensors"):
        plan_painting(str(tmp_path), PaintingConfig())


@pytest.mark.parametrize("index", ["", "[]", "{", "[" * 100_000])
def test_an_index_that_is_none_is_refused(tmp_path: Path, index: str) -> None:
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ModelSourceError, match="model_index"):
        plan_painting(str(tmp_path), PaintingConfig())


@pytest.mark.parametrize(
    "options",
    [
        {"max_step_tokens": 0},
        {"text_encoder_precisions": "bf16,int3"},
        {"backend": "comfy"},
        {"picture_timeout": -1.0},
    ],
)
def test_options_that_cannot_be_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        PaintingConfig(**options)


def test_the_language_path_imports_nothing_of_this() -> None:
    """Neither the server of a language model, nor its engine, nor `sapwood.LLM`."""
    script = (
        "import sys, sapwood.app.serving.launch, sapwood.app.building.wiring\n"
        "import sapwood.app.building.engine_process, sapwood.app.cli.serve\n"
        "from sapwood import LLM\n"
        "rooms = ('diffusion', 'pipelines', 'app.painting', 'models.dit', 'models.vae',"
        " 'frontends.images')\n"
        "found = [name for name in sys.modules for room in rooms"
        " if name.startswith(f'sapwood.{room}')]\n"
        "assert not found and 'diffusers' not in sys.modules, found"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
