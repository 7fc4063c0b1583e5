"""Preparing of pictures equals transformers' own processors within one grey level."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from PIL import Image

from sapwood.multimodal.family import FamilySetting, family_of

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
    processor = {"patch_size": 16} if model_type == "mistral3" else {}
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
                assert np.array_equal(np.asarray(expected[name]), ours.tensors[name])


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


def _picture(height: int, width: int) -> np.ndarray:
    noise = np.random.default_rng(height * 1000 + width).integers(0, 256, (9, 7, 3))
    smooth = Image.fromarray(noise.astype(np.uint8)).resize((width, height), 3)
    return np.asarray(smooth)


def _oracle(place: str) -> Any:
    from importlib import import_module

    module, _, name = place.partition(":")
    return getattr(import_module(f"transformers.models.{module}"), name)
