"""More families of models that see, in the form of tests/seeing.py."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from sapwood.schema.media import Medium
from sapwood.schema.tile_grids import best_grid, unpadded
from tests.seeing import (
    IMAGE,
    VIDEO,
    Seeing,
    any_size,
    grid_picture,
    grid_tokens,
    medium,
    num_frames,
    num_tiles,
    tile_tokens,
    tiles,
)

SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 4,
}
CLIP = {**SIGLIP, "model_type": "clip_vision_model", "image_size": 12, "projection_dim": 32}
PIXTRAL = {
    "model_type": "pixtral",
    "hidden_size": 32,
    "intermediate_size": 48,
    "patch_size": 4,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 48,
}
MANY = [(1, 0, 0), (3, 0, 0), (2, 0, 0)]
ONE = [(1, 0, 0)] * 3
GRIDS = [(1, 4, 6), (1, 8, 4), (1, 2, 10)]
IDS = {"image_token_id": IMAGE}
BOTH = {"image_token_id": IMAGE, "video_token_id": VIDEO}
PINS = [[12, 24], [24, 12], [24, 24]]


def next_picture(seed: int, size: tuple[int, int, int]) -> Medium:
    """Tiles of 12 x 12 pixels of a picture of that height and width."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = (one // 12 for one in best_grid(size[1:], [(a, b) for a, b in PINS]))
    pixels = torch.randn(1 + rows * columns, 3, 12, 12, generator=generator)
    return medium("image", pixel_values=pixels, image_sizes=torch.tensor(size[1:]))


def next_tokens(one: Medium) -> int:
    height, width = np.frombuffer(one.tensors["image_sizes"].data, np.int64).tolist()
    rows, columns = (side // 12 for side in best_grid((height, width), [(a, b) for a, b in PINS]))
    _, (tall, wide) = unpadded((height, width), (rows * 3, columns * 3))
    return 9 + tall * (wide + 1)


def pixels_over(area: int) -> Any:
    """Tokens of a picture with one for so many pixels."""
    return lambda one: int(np.frombuffer(one.tensors["image_sizes"].data, np.int64).prod()) // area


def own_names(tensors: dict[str, torch.Tensor], _: dict[str, Any]) -> dict[str, torch.Tensor]:
    """transformers 5.24 writes the text part's layers under a name that it does not read."""
    return {
        name.replace("language_model.model.encoder.layers", "language_model.model.layers"): one
        for name, one in tensors.items()
    }


def internvl_chat(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> dict[str, torch.Tensor]:
    vision = config["vision_config"]
    config |= {"architectures": ["InternVLChatModel"], "model_type": "internvl_chat"}
    config["llm_config"] = config.pop("text_config")
    vision |= {"image_size": 24, "patch_size": 4}
    vision["qkv_bias"] = vision.pop("attention_bias")
    return own_names(tensors, config)


def patch_squares(seed: int, size: tuple[int, int, int]) -> Medium:
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randn(size[1] * size[2], 3, 4, 4, generator=generator)
    return medium("image", pixel_values=pixels, image_grid_thw=torch.tensor(size))


def lfm_picture(seed: int, size: tuple[int, int, int]) -> Medium:
    """Tiles of these rows and columns of patches, filled up by two more."""
    generator = torch.Generator().manual_seed(seed)
    tiles, rows, columns = size
    count = rows * columns
    pixels = torch.randn(tiles, 40, 48, generator=generator)
    mask = (torch.arange(40) < count).long().expand(tiles, -1).contiguous()
    shapes = torch.tensor([[rows, columns]] * tiles)
    return medium("image", pixel_values=pixels, pixel_attention_mask=mask, spatial_shapes=shapes)


def lfm_tokens(one: Medium) -> int:
    shapes = np.frombuffer(one.tensors["spatial_shapes"].data, np.int64).reshape(-1, 2)
    return int(shapes.prod(1).sum()) // 4


GLM4V = Seeing(
    "glm4v",
    {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
        | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5}
    },
    {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
    | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
    | {"intermediate_size": 48, "image_size": 24},
    grid_picture(3 * 2 * 4 * 4),
    grid_tokens(2),
    GRIDS,
    BOTH,
    video_sizes=[(3, 4, 4)],
    parts=num_frames,
    video_token=IMAGE,
)
QIANFAN = Seeing(
    "qianfan_ocr",
    {"model_type": "qwen3"},
    {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    | {"num_attention_heads": 2, "image_size": [24, 24], "patch_size": [4, 4]}
    | {"attention_bias": True},
    tiles(24),
    tile_tokens(9),
    MANY,
    IDS,
    rewritten=own_names,
)

MORE: dict[str, Seeing] = {
    "Qwen3-VL-MoE": Seeing(
        "qwen3_vl_moe",
        {
            **EXPERTS,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [6, 5, 5], "mrope_interleaved": True},
        },
        {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "num_position_embeddings": 25}
        | {"deepstack_visual_indexes": [0, 2]},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        GRIDS,
        BOTH,
        video_sizes=[(3, 4, 4)],
        parts=num_frames,
    ),
    "Qwen3.5-MoE": Seeing(
        "qwen3_5_moe",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 32}
        | {"linear_value_head_dim": 32, "num_hidden_layers": 4, **EXPERTS}
        | {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "partial_rotary_factor": 0.25}
        },
        {"depth": 2, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "num_position_embeddings": 25},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        GRIDS,
        BOTH,
        video_sizes=[(3, 4, 4)],
        parts=num_frames,
    ),
    "Qianfan-OCR": QIANFAN,
    "InternVL by its own names": replace(QIANFAN, rewritten=internvl_chat),
    "Pixtral": Seeing(
        "llava",
        {"model_type": "mistral", "sliding_window": None},
        PIXTRAL,
        any_size,
        pixels_over(16),
        [(1, 8, 12)] * 3,
        {**IDS, "vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
        parts=lambda _: 2,
    ),
    "LightOnOCR": Seeing(
        "lighton_ocr",
        {"model_type": "qwen3"},
        PIXTRAL,
        any_size,
        pixels_over(64),
        [(1, 16, 24)] * 3,
        {**IDS, "spatial_merge_size": 2},
        parts=lambda _: 2,
    ),
    "ViP-LLaVA": Seeing(
        "vipllava",
        {"model_type": "llama"},
        CLIP,
        tiles(12),
        tile_tokens(9),
        ONE,
        {**IDS, "vision_feature_layer": [-2, -3, 1]},
    ),
    "LLaVA-NeXT": Seeing(
        "llava_next",
        {"model_type": "llama"},
        CLIP,
        next_picture,
        next_tokens,
        [(1, 12, 20), (1, 30, 9), (1, 17, 17)],
        {**IDS, "image_grid_pinpoints": PINS},
    ),
    "LLaVA-OneVision": Seeing(
        "llava_onevision",
        {"model_type": "qwen2"},
        {**SIGLIP, "image_size": 12},
        next_picture,
        next_tokens,
        [(1, 12, 20), (1, 30, 9), (1, 17, 17)],
        {**BOTH, "image_grid_pinpoints": PINS},
    ),
    "Aya Vision": Seeing(
        "aya_vision",
        {"model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 24}
        | {"logit_scale": 1.0},
        SIGLIP,
        tiles(24),
        tile_tokens(9),
        MANY,
        {**IDS, "vision_feature_layer": -1, "alignment_intermediate_size": 40},
    ),
    "Command A Vision": Seeing(
        "cohere2_vision",
        {"model_type": "cohere2", "num_hidden_layers": 4, "sliding_window": 24}
        | {"logit_scale": 1.0},
        SIGLIP,
        tiles(24),
        tile_tokens(9),
        MANY,
        {**IDS, "alignment_intermediate_size": 40},
    ),
    "Llama 4": Seeing(
        "llama4",
        {"num_local_experts": 4, "intermediate_size_mlp": 96, "num_hidden_layers": 4}
        | {"attention_chunk_size": 32, "pad_token_id": None},
        {"hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 2}
        | {"num_attention_heads": 2, "image_size": 24, "patch_size": 4}
        | {"projector_input_dim": 40, "projector_output_dim": 40, "vision_output_dim": 40},
        tiles(24),
        tile_tokens(9),
        MANY,
        {"image_token_index": IMAGE},
    ),
    "GLM-4.1V": GLM4V,
    "GLM-4.6V": replace(
        GLM4V,
        model_type="glm46v",
        text={**GLM4V.text, "model_type": "glm4v_text"},
        vision={**GLM4V.vision, "model_type": "glm4v_vision"},
    ),
    "GLM-4.5V": replace(
        GLM4V,
        model_type="glm4v_moe",
        text={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [2, 3, 3], "partial_rotary_factor": 0.5},
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 40,
            "first_k_dense_replace": 1,
        },
    ),
    "GLM-OCR": replace(
        GLM4V,
        model_type="glm_ocr",
        text={
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [4, 6, 6]}
        },
        vision={**GLM4V.vision, "attention_bias": True},
    ),
    "EXAONE 4.5": Seeing(
        "exaone4_5",
        {"model_type": "exaone4", "num_hidden_layers": 4, "sliding_window": 24},
        {"depth": 3, "hidden_size": 32, "out_hidden_size": 64, "num_heads": 4}
        | {"num_key_value_heads": 2}
        | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}
        | {"intermediate_size": 48, "window_size": 16, "fullatt_block_indexes": [1]},
        grid_picture(3 * 2 * 4 * 4),
        grid_tokens(2),
        GRIDS,
        BOTH,
        video_sizes=[(3, 6, 4)],
    ),
    "PaddleOCR-VL": Seeing(
        "paddleocr_vl",
        {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}
            | {"mrope_section": [4, 6, 6]}
        },
        {key: value for key, value in SIGLIP.items() if key != "model_type"}
        | {"spatial_merge_size": 2},
        patch_squares,
        grid_tokens(2),
        GRIDS,
        BOTH,
    ),
    "LFM2-VL": Seeing(
        "lfm2_vl",
        {"model_type": "lfm2", "block_multiple_of": 16, "full_attn_idxs": [1]},
        {"model_type": "siglip2_vision_model", "hidden_size": 32, "intermediate_size": 48}
        | {"num_hidden_layers": 2, "num_attention_heads": 2, "num_patches": 16, "patch_size": 4},
        lfm_picture,
        lfm_tokens,
        [(1, 4, 6), (2, 8, 4), (1, 2, 10)],
        {**IDS, "projector_hidden_size": 40},
    ),
    "Gemma 3": Seeing(
        "gemma3",
        {"sliding_window": 24, "query_pre_attn_scalar": 32, "num_hidden_layers": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
        {key: value for key, value in SIGLIP.items() if key != "model_type"},
        tiles(24),
        tile_tokens(9),
        MANY,
        {**IDS, "mm_tokens_per_image": 9},
        parts=num_tiles,
        needs_types=True,
    ),
}
