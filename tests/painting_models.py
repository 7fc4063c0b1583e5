"""Tiny random pipelines of diffusers, saved as folders, with tokenizers of one token per byte."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from tests.painting_peers import random_weights

START, END, PAD = 256, 257, 258
VOCAB = 260


def byte_tokenizer(length: int, *, frames: bool, pads_with_end: bool = False) -> Any:
    """frames: whether a text begins with a token of its own; all of them end with one."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(
        tokenizers.models.BPE({letter: i for i, letter in enumerate(alphabet)}, [])
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<pad>"])
    backend.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A </s>" if frames else "$A </s>",
        special_tokens=[("<s>", START), ("</s>", END)],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>" if pads_with_end else "<pad>",
        model_max_length=length,
    )


def clip(*, size: int = 24, projection: int | None = None, eos: int = END, seed: int = 1) -> Any:
    config = transformers.CLIPTextConfig(
        vocab_size=VOCAB,
        hidden_size=size,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=20,
        projection_dim=projection or 16,
        eos_token_id=eos,
        bos_token_id=START,
        pad_token_id=PAD,
    )
    kind = transformers.CLIPTextModelWithProjection if projection else transformers.CLIPTextModel
    return _random(kind(config), seed)


def t5(*, size: int = 20, seed: int = 2) -> Any:
    config = transformers.T5Config(
        vocab_size=VOCAB,
        d_model=size,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return _random(transformers.T5EncoderModel(config), seed)


def kl(**fields: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    sizes: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (8, 16),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": 4,
        "sample_size": 64,
    }
    return _random(AutoencoderKL(**sizes, **fields), 3)


def flux(*, has_guidance: bool = True, pipeline: str = "FluxPipeline") -> Any:
    import diffusers

    # Fill's tokens have the latents, what stays of the picture, and 4 pixels of the mask each.
    is_fill = pipeline == "FluxFillPipeline"
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=48 if is_fill else 16,
        out_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=20,
        pooled_projection_dim=24,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=has_guidance,
    )
    return getattr(diffusers, pipeline)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=has_guidance, shift=3.0 if has_guidance else 1.0
        ),
        text_encoder=clip(),
        tokenizer=byte_tokenizer(20, frames=True),
        text_encoder_2=t5(),
        tokenizer_2=byte_tokenizer(512, frames=False),
        transformer=_random(transformer, 4),
        vae=kl(
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
    )


def qwen_image() -> Any:
    import diffusers

    text = {
        "vocab_size": VOCAB,
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1200,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [0],
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        axes_dims_rope=(4, 4, 8),
    )
    vae = diffusers.AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=4,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 0.7, 1.1, 0.9],
    )
    return diffusers.QwenImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            max_image_seq_len=8192,
            shift_terminal=0.02,
        ),
        vae=_random(vae, 3),
        text_encoder=_random(transformers.Qwen2_5_VLForConditionalGeneration(config), 1),
        tokenizer=byte_tokenizer(2000, frames=False),
        transformer=_random(transformer, 4),
    )


def qwen_image_edit(pipeline: str = "QwenImageEditPipeline") -> Any:
    import diffusers
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    parts = dict(qwen_image().components)
    tokenizer = parts["tokenizer"]
    tokens = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": list(tokens)})
    text = {
        "vocab_size": VOCAB + len(tokens),
        "hidden_size": 64,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 1200,
        "bos_token_id": None,
        "eos_token_id": None,
        "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6], "rope_theta": 1e6},
    }
    vision = {
        "depth": 2,
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
        "patch_size": 4,
        "window_size": 16,
    }
    named = {
        name: tokenizer.convert_tokens_to_ids(token)
        for name, token in zip(
            ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
            tokens,
            strict=True,
        )
    }
    config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **named)
    parts["text_encoder"] = _random(transformers.Qwen2_5_VLForConditionalGeneration(config), 1)
    images = Qwen2VLImageProcessorPil(patch_size=4, min_pixels=8 * 8, max_pixels=4096)
    parts["processor"] = SeeingProcessor(images, tokenizer)
    return getattr(diffusers, pipeline)(**parts)


class SeeingProcessor:
    """What Qwen2VLProcessor does with pictures, which wants torchvision for videos."""

    def __init__(self, images: Any, tokenizer: Any) -> None:
        self.images, self.tokenizer = images, tokenizer

    def __call__(self, *, text: list[str], images: Any, **kwargs: Any) -> Any:
        found = self.images(images=images, return_tensors="pt")
        (whole,) = text
        for grid in found["image_grid_thw"]:
            count = int(grid.prod()) // self.images.merge_size**2
            whole = whole.replace("<|image_pad|>", "<|placeholder|>" * count, 1)
        whole = whole.replace("<|placeholder|>", "<|image_pad|>")
        return transformers.BatchFeature({**self.tokenizer([whole], return_tensors="pt"), **found})

    def save_pretrained(self, folder: Any, **kwargs: Any) -> None:
        self.tokenizer.save_pretrained(folder)
        self.images.save_pretrained(folder)


def z_image() -> Any:
    import diffusers

    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=48,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=600,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformer = diffusers.ZImageTransformer2DModel(
        in_channels=4,
        dim=48,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=3,
        n_kv_heads=3,
        cap_feat_dim=48,
        axes_dims=[4, 6, 6],
        axes_lens=[600, 64, 64],
    )
    tokenizer = byte_tokenizer(2000, frames=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return diffusers.ZImagePipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=kl(
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=0.3611,
            shift_factor=0.1159,
        ),
        text_encoder=_random(transformers.Qwen3Model(config), 1),
        tokenizer=tokenizer,
        transformer=_random(transformer, 4),
    )


_UNET: dict[str, Any] = {
    "block_out_channels": (8, 16),
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "sample_size": 16,
}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def stable_diffusion(scheduler: str = "PNDMScheduler") -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        **_UNET,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=24,
        attention_head_dim=2,
    )
    fields: dict[str, Any] = {"steps_offset": 1, **_BETAS}
    if scheduler == "PNDMScheduler":
        fields["skip_prk_steps"] = True
    if scheduler == "DDIMScheduler":
        fields["clip_sample"] = False
    return diffusers.StableDiffusionPipeline(
        scheduler=getattr(diffusers, scheduler)(**fields),
        text_encoder=clip(),
        tokenizer=byte_tokenizer(20, frames=True),
        unet=_random(unet, 4),
        vae=kl(scaling_factor=0.18215),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def stable_diffusion_xl(scheduler: str = "EulerDiscreteScheduler") -> Any:
    import diffusers

    unet = diffusers.UNet2DConditionModel(
        **_UNET,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=24 + 32,
        transformer_layers_per_block=(1, 2),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=16 + 6 * 8,
    )
    return diffusers.StableDiffusionXLPipeline(
        scheduler=getattr(diffusers, scheduler)(
            timestep_spacing="leading", steps_offset=1, **_BETAS
        ),
        text_encoder=clip(),
        tokenizer=byte_tokenizer(20, frames=True),
        text_encoder_2=clip(size=32, projection=16, seed=5),
        tokenizer_2=byte_tokenizer(20, frames=True, pads_with_end=False),
        unet=_random(unet, 4),
        vae=kl(scaling_factor=0.13025),
        add_watermarker=False,
    )


def stable_diffusion_3(*, is_dual: bool = True, has_t5: bool = True) -> Any:
    import diffusers

    transformer = diffusers.SD3Transformer2DModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=3,
        joint_attention_dim=64,
        caption_projection_dim=24,
        pooled_projection_dim=32,
        pos_embed_max_size=20,
        dual_attention_layers=(0, 2) if is_dual else (),
        qk_norm="rms_norm" if is_dual else None,
    )
    return diffusers.StableDiffusion3Pipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(
            shift=3.0, use_dynamic_shifting=not has_t5
        ),
        text_encoder=clip(projection=16),
        tokenizer=byte_tokenizer(20, frames=True),
        text_encoder_2=clip(size=32, projection=16, seed=5),
        tokenizer_2=byte_tokenizer(20, frames=True),
        text_encoder_3=t5(size=64) if has_t5 else None,
        tokenizer_3=byte_tokenizer(512, frames=False) if has_t5 else None,
        transformer=_random(transformer, 4),
        vae=kl(
            use_quant_conv=False,
            use_post_quant_conv=False,
            scaling_factor=1.5305,
            shift_factor=0.0609,
        ),
    )


def flux2_klein(*, is_distilled: bool = False) -> Any:
    import diffusers

    config = transformers.Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=48,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=600,
        bos_token_id=None,
        eos_token_id=None,
    )
    transformer = diffusers.Flux2Transformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 24,
        timestep_guidance_channels=256,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=64,
    )
    generator = torch.Generator().manual_seed(8)
    vae.bn.running_mean.copy_(0.3 * torch.randn(16, generator=generator))
    vae.bn.running_var.copy_(0.5 + torch.rand(16, generator=generator))
    tokenizer = byte_tokenizer(2000, frames=False)
    tokenizer.chat_template = (
        "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    return diffusers.Flux2KleinPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
        vae=_random(vae, 3),
        text_encoder=_random(transformers.Qwen3ForCausalLM(config), 1),
        tokenizer=tokenizer,
        transformer=_random(transformer, 4),
        is_distilled=is_distilled,
    )


def umt5() -> Any:
    config = transformers.UMT5Config(
        vocab_size=VOCAB,
        d_model=20,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
    )
    return _random(transformers.UMT5EncoderModel(config), 2)


def wan_vae(*, is_residual: bool = False) -> Any:
    import diffusers

    sizes: dict[str, Any] = {"base_dim": 4, "z_dim": 4, "dim_mult": [1, 2, 2]}
    if is_residual:
        sizes |= {
            "decoder_base_dim": 6,
            "is_residual": True,
            "patch_size": 2,
            "in_channels": 12,
            "out_channels": 12,
            "scale_factor_spatial": 8,
        }
    else:
        sizes["scale_factor_spatial"] = 4
    vae = diffusers.AutoencoderKLWan(
        **sizes,
        num_res_blocks=1,
        temperal_downsample=[True, True],
        latents_mean=[0.1, -0.2, 0.3, 0.4],
        latents_std=[1.5, 0.7, 1.1, 0.9],
    )
    return _random(vae, 3)


def wan(kind: str = "t2v", scheduler: str = "UniPCMultistepScheduler", **fields: Any) -> Any:
    """kind: "t2v", "two" (two transformers), "i2v", "two i2v", "ti2v", "ti2v picture" """
    import diffusers

    sees = kind == "i2v"
    beside = kind in ("i2v", "two i2v")

    def transformer(seed: int) -> Any:
        made = diffusers.WanTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=12 if beside else 4,
            out_channels=4,
            text_dim=20,
            freq_dim=16,
            ffn_dim=40,
            num_layers=2,
            image_dim=24 if sees else None,
            added_kv_proj_dim=24 if sees else None,
        )
        return _random(made, seed)

    shifts: dict[str, Any] = {"shift": 3.0}
    if scheduler == "UniPCMultistepScheduler":
        shifts = {
            "prediction_type": "flow_prediction",
            "use_flow_sigmas": True,
            "flow_shift": 3.0,
            "num_train_timesteps": 1000,
        }
    parts: dict[str, Any] = {
        "scheduler": getattr(diffusers, scheduler)(**shifts, **fields),
        "text_encoder": umt5(),
        "tokenizer": byte_tokenizer(512, frames=False),
        "transformer": transformer(4),
        "vae": wan_vae(is_residual=kind.startswith("ti2v")),
    }
    if kind.startswith("two"):
        parts |= {"transformer_2": transformer(5), "boundary_ratio": 0.875}
    if kind.startswith("ti2v"):
        parts["expand_timesteps"] = True
    if not beside and kind != "ti2v picture":
        return diffusers.WanPipeline(**parts)
    if sees:
        parts |= {"image_encoder": clip_vision(), "image_processor": clip_pictures()}
    else:
        parts |= {"image_encoder": None, "image_processor": None}
    return diffusers.WanImageToVideoPipeline(**parts)


def clip_vision() -> Any:
    config = transformers.CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=28,
        patch_size=14,
        projection_dim=16,
        hidden_act="gelu",
    )
    return _random(transformers.CLIPVisionModel(config), 6)


def clip_pictures() -> Any:
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})


def saved(pipeline: Any, folder: Path) -> Path:
    pipeline.save_pretrained(folder)
    return folder


def _random(model: torch.nn.Module, seed: int) -> Any:
    random_weights(model, seed)
    return model.eval()


if __name__ == "__main__":
    import sys

    is_video = sys.argv[2:] == ["video"]
    where = saved(wan() if is_video else flux(), Path(sys.argv[1]))
    kind = "Wan" if is_video else "Flux"
    sys.stderr.write(f"{where} is a tiny {kind} of random weights: what it draws shows nothing\n")
