"""`sapwood paint`: draw a picture, without a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sapwood.app.cli.kinds import MODEL_INDEX, draws
from sapwood.app.cli.options import Asked, ConfigCommand, config_options
from sapwood.base.errors import ConfigError
from sapwood.schema.config.model import ModelConfig
from sapwood.schema.config.painting import PaintingConfig

if TYPE_CHECKING:
    from PIL.Image import Image

_ENGINE_OPTIONS = (
    "model",
    "backend",
    "dit_precision",
    "dit_quantization",
    "dit_path",
    "text_encoder_precisions",
    "vae_precision",
    "vae_tiling",
    "lora_path",
    "lora_nickname",
    "lora_scale",
    "max_step_tokens",
)
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")
_VIDEOS = (".mp4", ".webm", ".gif", ".zip")


@click.command(cls=ConfigCommand)
@click.argument("prompt")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path, dir_okay=False),
    required=True,
    metavar="FILE",
    help="Where the picture goes (.png, .jpg, .webp), or the video (.mp4, .webm, .gif, .zip: a "
    "PNG per frame); of several, FILE-2 is the second.",
)
@click.option("--seed", type=click.IntRange(min=0), metavar="N", help="Default: a random one.")
@click.option("--width", type=click.IntRange(min=1), metavar="N", help="In pixels.")
@click.option("--height", type=click.IntRange(min=1), metavar="N", help="In pixels.")
@click.option("--num-inference-steps", type=click.IntRange(min=1), metavar="N")
@click.option("--num-frames", type=click.IntRange(min=1), metavar="N", help="Of a video.")
@click.option(
    "--fps",
    type=click.IntRange(min=1, max=120),
    metavar="N",
    help="Frames per second of a video; default: as the model was trained.",
)
@click.option("--guidance-scale", type=float, metavar="X")
@click.option(
    "--guidance-scale-2", type=float, metavar="X", help="Of the second transformer (Wan 2.2)."
)
@click.option("--true-cfg-scale", type=float, metavar="X")
@click.option("--negative-prompt", metavar="TEXT")
@click.option(
    "--num-outputs-per-prompt",
    "-n",
    "num_pictures",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    metavar="N",
    help="Pictures, with seeds N, N+1, …; they are drawn together.",
)
@click.option(
    "--image-path",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    multiple=True,
    metavar="FILE",
    help="A picture to change or to look at; may be given several times.",
)
@config_options(ModelConfig, PaintingConfig, only=_ENGINE_OPTIONS)
def paint(
    prompt: str,
    output: Path,
    num_pictures: int,
    fps: int | None,
    image_path: tuple[Path, ...],
    asked: Asked,
    **options: Any,
) -> None:
    """Draw PROMPT with a diffusion model (--model FOLDER), and write a picture or a video."""
    if not draws(asked):
        model = asked.build(ModelConfig).model
        raise ConfigError(
            f"{model} is no folder with {MODEL_INDEX}; give a diffusers folder as --model"
        )
    # Checked first: a picture that cannot be written would be drawn in vain.
    suffix = output.suffix.lower()
    if suffix not in _PICTURES + _VIDEOS:
        raise ConfigError(f"{output} must end in {', '.join(_PICTURES + _VIDEOS)}")
    if suffix in _PICTURES:
        # A pipeline of videos draws pictures too: videos of one frame.
        frames = options.pop("num_frames", None)
        if frames is not None and frames > 1:
            raise ConfigError(f"{output} must end in {', '.join(_VIDEOS)} to hold {frames} frames")
    if not output.resolve().parent.is_dir():
        raise ConfigError(f"there is no folder {output.resolve().parent}")
    from sapwood.app.painting.painter import Painter

    given = {name: item.value for name, item in asked.given.items() if name in _ENGINE_OPTIONS}
    model = given.pop("model")
    images = [_opened(path) for path in image_path]
    with Painter(model, **given) as painter, _Bar() as bar:
        for note in painter.plan.notes:
            click.echo(note, err=True)
        told = {name: value for name, value in options.items() if value is not None}
        if suffix in _PICTURES and painter.draws_videos:
            told["num_frames"] = 1
        pictures = painter.paint(prompt, n=num_pictures, images=images, on_step=bar.show, **told)
    for place, picture in enumerate(pictures):
        name = output if place == 0 else output.with_stem(f"{output.stem}-{place + 1}")
        picture.save(name, fps=fps)
        click.echo(
            f"{name}: seed {picture.seed}, {picture.num_steps} steps, {picture.paint_s:.1f} s"
        )


class _Bar:
    """A progress bar on stderr, a step of a picture at a time."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

        self._progress = Progress(
            "steps",
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task = self._progress.add_task("steps", total=None)

    def __enter__(self) -> _Bar:
        self._progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._progress.stop()

    def show(self, step: int, num_steps: int) -> None:
        self._progress.update(self._task, completed=step, total=num_steps)


def _opened(path: Path) -> Image:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(path)
        image.load()
    except (OSError, ValueError, UnidentifiedImageError) as error:
        raise ConfigError(f"{path} is no picture that can be read: {error}") from error
    return image
