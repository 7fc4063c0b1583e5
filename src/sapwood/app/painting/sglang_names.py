"""SGLang's `DiffGenerator` over `Painter`: its programs run with another import line."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sapwood.app.painting.painter import PaintedPicture, Painter
from sapwood.base.errors import InvalidRequest

_OURS = (
    "negative_prompt",
    "width",
    "height",
    "num_inference_steps",
    "guidance_scale",
    "true_cfg_scale",
    "max_sequence_length",
    "num_frames",
    "guidance_scale_2",
)
_IDLE: Mapping[str, tuple[object, ...]] = {
    "generator_device": ("cpu",),
    "enable_teacache": (False, None),
}
"""Arguments of SGLang's that only ask for what happens anyway."""
_DEFAULT_SEED = 1024


class DiffGenerator:
    """Draws pictures, called as SGLang's class of that name."""

    def __init__(self, painter: Painter) -> None:
        self._painter = painter

    @classmethod
    def from_pretrained(cls, model_path: str, **options: Any) -> DiffGenerator:
        """options: as those of `Painter`; num_gpus may be 1, local_mode True"""
        for name, idle in (("num_gpus", 1), ("local_mode", True)):
            given = options.pop(name, idle)
            if given != idle:
                raise InvalidRequest(f"{name} is {given} but must be {idle}", param=name)
        precisions = options.get("text_encoder_precisions")
        if isinstance(precisions, (list, tuple)):
            options["text_encoder_precisions"] = ",".join(precisions)
        return cls(Painter(model_path, **options))

    def generate(
        self, sampling_params_kwargs: Mapping[str, Any] | None = None, **arguments: Any
    ) -> Any:
        """One result, or a list of them for several pictures.

        A result is a dict with `frames` (a list of [height, width, 3] uint8 arrays, one for each
        frame), `prompts`, `size` (height, width, frames), `generation_time`, `peak_memory_mb` and
        `prompt_index`; with return_frames=True it is `frames` alone. save_output=True writes
        pictures to the folder output_path, or to the file output_file_name there.
        """
        given = {**(sampling_params_kwargs or {}), **arguments}
        prompt = given.pop("prompt", None) or " "
        n = given.pop("num_outputs_per_prompt", None) or 1
        seed = given.pop("seed", _DEFAULT_SEED)
        returns_frames = bool(given.pop("return_frames", False))
        saves = bool(given.pop("save_output", False))
        folder = Path(given.pop("output_path", None) or "outputs")
        file_name = given.pop("output_file_name", None)
        fps = given.pop("fps", None)
        options = {name: given.pop(name) for name in _OURS if name in given}
        for name, value in given.items():
            if value is not None and value not in _IDLE.get(name, ()):
                raise InvalidRequest(f"{name} is not offered; leave it out", param=name)
        pictures = self._painter.paint(prompt, n=n, seed=seed, **options)
        if saves:
            _save(pictures, folder, file_name, fps)
        results = [_result(picture, index % n) for index, picture in enumerate(pictures)]
        told = [result["frames"] for result in results] if returns_frames else results
        return told[0] if len(told) == 1 else told

    def shutdown(self) -> None:
        """Give the model's memory back."""
        self._painter.close()

    def __enter__(self) -> DiffGenerator:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.shutdown()


def _save(
    pictures: list[PaintedPicture], folder: Path, file_name: str | None, fps: int | None
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for place, picture in enumerate(pictures):
        suffix = "mp4" if picture.picture.num_frames > 1 else "png"
        name = Path(file_name or f"seed_{picture.seed}.{suffix}").name
        if place and file_name:
            name = f"{Path(name).stem}_{place}{Path(name).suffix}"
        picture.save(folder / name, fps=fps)


def _result(picture: PaintedPicture, place: int) -> dict[str, Any]:
    import numpy as np

    return {
        "frames": [np.array(frame.convert("RGB")) for frame in picture.frames],
        "prompts": picture.prompt,
        "size": (picture.picture.height, picture.picture.width, picture.picture.num_frames),
        "generation_time": picture.paint_s,
        "peak_memory_mb": picture.peak_bytes / 1e6,
        "prompt_index": place,
    }
