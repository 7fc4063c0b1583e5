"""Preparing of pictures equals transformers' own processors within one grey level."""

from __future__ import annotations

import sys
from fractions import Fraction
from importlib import import_module
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from PIL import Image

from sapwood.multimodal.family import Clip, FamilySetting, family_of

SIZES = [(100, 100), (333, 97), (97, 333), (640, 480), (31, 29), (700, 1100)]
"""(height, width)"""

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_vl": ("qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil", {}),
    "llava": ("llava.image_processing_pil_llava:LlavaImageProcessorPil", {}),
    "llava padded": (
        "llava.image_processing_pil_llava:LlavaImageProcessorPil",
        {"do_pad": True, "size": {"shortest_edge": 100}, "crop_size": {"height": 96, "width": 96}},
    ),
    "siglip": (
        "siglip.image_processing_pil_siglip:SiglipImageProcessorPil",
        {"size": {"height": 112, "width": 112}},
    ),
    "gemma3": ("gemma3.image_processing_pil_gemma3:Gemma3ImageProcessorPil", {}),
    "gemma3 pans": (
        "gemma3.image_processing_pil_gemma3:Gemma3ImageProcessorPil",
        {
            "do_pan_and_scan": True,
            "pan_and_scan_min_crop_size": 64,
            "pan_and_scan_max_num_crops": 4,
            "pan_and_scan_min_ratio_to_activate": 1.2,
        },
    ),
    "mistral3": ("pixtral.image_processing_pil_pixtral:PixtralImageProcessorPil", {}),
    "idefics3": (
        "idefics3.image_processing_pil_idefics3:Idefics3ImageProcessorPil",
        {"size": {"longest_edge": 256}, "max_image_size": {"longest_edge": 64}},
    ),
    "smolvlm": (
        "smolvlm.image_processing_pil_smolvlm:SmolVLMImageProcessorPil",
        {
            "size": {"longest_edge": 256},
            "max_image_size": {"longest_edge": 64},
            "do_image_splitting": False,
        },
    ),
    "glm4v": ("glm4v.image_processing_pil_glm4v:Glm4vImageProcessorPil", {}),
    "glm46v": ("glm46v.image_processing_pil_glm46v:Glm46VImageProcessorPil", {}),
    "exaone4_5": ("qwen2_vl.image_processing_pil_qwen2_vl:Qwen2VLImageProcessorPil", {}),
    "lighton_ocr": ("pixtral.image_processing_pil_pixtral:PixtralImageProcessorPil", {}),
    "llava_next": (
        "llava_next.image_processing_pil_llava_next:LlavaNextImageProcessorPil",
        {
            "size": {"shortest_edge": 56},
            "crop_size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 112], [112, 56], [112, 112], [168, 56]],
        },
    ),
    "llava_onevision": (
        "llava_onevision.image_processing_pil_llava_onevision:LlavaOnevisionImageProcessorPil",
        {
            "size": {"height": 56, "width": 56},
            "image_grid_pinpoints": [[56, 56], [56, 112], [112, 56], [112, 112], [168, 56]],
        },
    ),
    "paddleocr_vl": (
        "paddleocr_vl.image_processing_pil_paddleocr_vl:PaddleOCRVLImageProcessorPil",
        {"size": {"shortest_edge": 56 * 56, "longest_edge": 280 * 280}},
    ),
    "aya_vision": (
        "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
        {"crop_to_patches": True, "max_patches": 5, "size": {"height": 56, "width": 56}},
    ),
    "qianfan_ocr": (
        "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
        {"crop_to_patches": True, "max_patches": 4, "size": {"height": 56, "width": 56}},
    ),
    "internvl": (
        "got_ocr2.image_processing_pil_got_ocr2:GotOcr2ImageProcessorPil",
        {"crop_to_patches": True, "max_patches": 6, "size": {"height": 56, "width": 56}},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_pictures_equal_transformers_within_a_grey_level(case: str) -> None:
    place, options = CASES[case]
    oracle = _oracle(place)(**options)
    settings = oracle.to_dict()
    model_type = {"siglip": "llava"}.get(case, case.split()[0])
    processor = {"patch_size": 16} if model_type in ("mistral3", "lighton_ocr") else {}
    family = family_of(FamilySetting(model_type=model_type, image=settings, processor=processor))
    deviations = np.asarray(oracle.image_std, dtype=np.float32)
    grey = 1 / 255 / deviations.min() + 1e-4
    for height, width in SIZES:
        pixels = _picture(height, width)
        expected = oracle(Image.fromarray(pixels), return_tensors="np")
        ours = family.image(pixels, {})
        values = np.asarray(expected["pixel_values"])
        found = ours.tensors["pixel_values"]
        assert values.reshape(found.shape).shape == found.shape
        assert np.abs(values.reshape(found.shape) - found).max() <= grey
        for name in ("image_grid_thw", "image_sizes"):
            if name in ours.tensors:
                theirs = np.asarray(expected[name])
                assert np.array_equal(theirs.reshape(ours.tensors[name].shape), ours.tensors[name])


@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (2, 3)])
def test_idefics_names_its_tiles(rows: int, columns: int) -> None:
    setting = FamilySetting(
        model_type="idefics3",
        image={"size": {"longest_edge": 96}, "max_image_size": {"longest_edge": 32}},
        processor={"image_seq_len": 7},
    )
    pixels = _picture(64, 96) if rows else _picture(20, 20)
    if not rows:
        setting = FamilySetting(
            model_type="idefics3",
            image={"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 32}},
            processor={"image_seq_len": 7},
        )
    prepared = family_of(setting).image(pixels, {})
    fake = "<fake_token_around_image>"
    tiles = "".join(
        "".join(f"{fake}<row_{r + 1}_col_{c + 1}><image>" for c in range(columns)) + "\n"
        for r in range(rows)
    )
    whole = f"{fake}<global-img><image>{fake}"
    assert prepared.replacement == (tiles + "\n" + whole if rows else whole)
    assert prepared.counts == (7,) * (rows * columns + 1)


def test_pixtral_ends_each_row_with_a_token() -> None:
    family = family_of(FamilySetting(model_type="mistral3", processor={"patch_size": 16}))
    prepared = family.image(_picture(48, 32), {})
    assert prepared.replacement == "[IMG][IMG_BREAK][IMG][IMG_BREAK][IMG][IMG_END]"
    assert prepared.counts == (2, 2, 2)


def test_glm_tells_the_time_of_each_two_frames() -> None:
    frames = [_picture(56, 84)] * 4
    clip = Clip(frames=frames, indices=[0, 10, 20, 30], total=40, fps=Fraction(10))
    for model_type, times in (("glm4v", ["0", "2"]), ("glm46v", ["0.0 seconds", "2.0 seconds"])):
        family = family_of(FamilySetting(model_type=model_type))
        prepared = family.video(clip, {})
        token = "<|begin_of_image|><|image_pad|><|end_of_image|>"
        assert prepared.replacement == "".join(token + time for time in times)
        rows = prepared.tensors["video_grid_thw"][0]
        assert prepared.counts == (int(rows[1] * rows[2]) // 4,) * 2
        assert family.markers["video"] == "<|video|>"


@pytest.fixture
def without_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules of transformers whose resizing needs torchvision can be imported; what is compared
    resizes nothing."""
    from transformers.utils import is_torchvision_available

    is_torchvision_available()  # asked once, before the module seems to be there
    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional", ".io"):
        monkeypatch.setitem(sys.modules, f"torchvision{name}", MagicMock())


@pytest.mark.usefixtures("without_torchvision")
def test_frames_of_glm_equal_transformers() -> None:
    for place, model_type in (
        ("glm4v.video_processing_glm4v:Glm4vVideoProcessor", "glm4v"),
        ("glm46v.video_processing_glm46v:Glm46VVideoProcessor", "glm46v"),
    ):
        oracle = _oracle(place)
        like = SimpleNamespace(fps=2, max_duration=300, temporal_patch_size=2)
        family = family_of(FamilySetting(model_type=model_type))
        assert list(family.frames_of(1, Fraction(25), {})) == [0]
        for total, fps in ((40, 10), (100, 24), (9000, 25), (40_000, 25)):
            told = SimpleNamespace(total_num_frames=total, fps=fps, duration=total / fps)
            expected = list(dict.fromkeys(oracle.sample_frames(like, told).tolist()))
            assert list(family.frames_of(total, Fraction(fps), {})) == expected


GRIDS = [(100, 100), (300, 97), (97, 333), (640, 480), (31, 29), (700, 1100), (60, 900)]


@pytest.mark.usefixtures("without_torchvision")
def test_grids_equal_transformers() -> None:
    """Of families whose processors need torchvision."""
    module = import_module("transformers.models.cohere2_vision.image_processing_cohere2_vision")
    size = {"size": {"height": 56, "width": 56}}
    cohere = family_of(FamilySetting(model_type="cohere2_vision", image={**size, "max_patches": 6}))
    for height, width in GRIDS:
        columns, rows = module.get_optimal_tiled_canvas((height, width), (56, 56), 1, 6)
        tiles = cohere.image(_picture(height, width), {}).tensors["pixel_values"]
        assert len(tiles) == columns * rows + (columns * rows > 1)
    module = import_module("transformers.models.llama4.image_processing_llama4")
    square = SimpleNamespace(height=56, width=56)
    known = torch.tensor(module.find_supported_resolutions.__wrapped__(6, square))
    llama = family_of(FamilySetting(model_type="llama4", image={**size, "max_patches": 6}))
    for height, width in GRIDS:
        tall, wide = (int(one) // 56 for one in module.get_best_fit((height, width), known))
        prepared = llama.image(_picture(height, width), {})
        assert prepared.replacement.count("<|tile_y_separator|>") == (
            tall if tall * wide > 1 else 0
        )
        assert len(prepared.tensors["pixel_values"]) == tall * wide + (tall * wide > 1)


def test_lfm2_cuts_large_pictures() -> None:
    image = {"tile_size": 64, "encoder_patch_size": 16, "min_image_tokens": 4}
    family = family_of(
        FamilySetting(model_type="lfm2_vl", image={**image, "max_image_tokens": 16, "max_tiles": 4})
    )
    small = family.image(_picture(64, 96), {})
    assert small.replacement == "<|image_start|><image><|image_end|>"
    assert small.tensors["spatial_shapes"].tolist() == [[4, 6]]
    assert small.counts == (6,)
    values = small.tensors["pixel_values"][0].reshape(4, 6, 16, 16, 3)
    pixels = _picture(64, 96).reshape(4, 16, 6, 16, 3).transpose(0, 2, 1, 3, 4) / 127.5 - 1
    assert np.abs(values - pixels).max() < 1e-5
    large = family.image(_picture(400, 200), {})
    assert large.tensors["spatial_shapes"].tolist() == [[4, 4], [4, 4], [10, 4]]
    assert large.replacement.startswith("<|image_start|><|img_row_1_col_1|><image><|img_row_2")
    assert large.counts == (4, 4, 10)


def _picture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (9, 7, 3))
    smooth = Image.fromarray(noise.astype(np.uint8)).resize((width, height), 3)
    return np.asarray(smooth)


def _oracle(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"transformers.models.{module}"), name)
