"""Files of their own with a transformer's weights: their names, beside diffusers' conversions, and
what is drawn with them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from diffusers.loaders import single_file_utils as theirs
from safetensors.torch import save_file
from torch import Tensor

from sapwood.base.errors import WeightError
from sapwood.layers.quantization import SCHEMES
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest, run_whole
from sapwood.pipelines.originals import original, origins
from sapwood.pipelines.registry import load_pipeline
from tests import painting_models

REQUEST = PictureRequest(prompt="a red fox", height=32, width=16, num_inference_steps=2, seed=5)
PREFIX = "model.diffusion_model."


def component(peer: Any) -> Any:
    return peer.unet if hasattr(peer, "unet") else peer.transformer


def as_original(peer: Any) -> dict[str, Tensor]:
    """The weights under the names of the model's authors."""
    model = component(peer)
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    found: dict[str, Tensor] = {}
    for name, origin in spelled(list(weights), dict(model.config)).items():
        parts = [weights.pop(one) for one in origin.names]
        rows = torch.cat(parts) if len(parts) > 1 else parts[0]
        found[name] = rows.roll(len(rows) // 2, 0) if origin.turns else rows
    return found | weights


def spelled(names: list[str], config: dict[str, Any]) -> dict[str, Any]:
    """By whole tensor names: those of the authors, and what they stand for."""
    own, found = set(names), {}
    for name in origins(names, config):
        for whole in (name, f"{name}.weight", f"{name}.bias"):
            origin = original(whole, origins(names, config))
            if origin.names[0] != whole and own.issuperset(origin.names):
                found[whole] = origin
    return found


def check_names(
    model: Any, convert: Callable[[dict[str, Tensor]], dict[str, Tensor]], rows: dict[str, int]
) -> None:
    """A file whose every tensor has numbers of its own becomes the same by diffusers' conversion.

    rows  of tensors, by the ends of our names, where the conversion wants those of real models
    """
    config = dict(model.config) | {"_class_name": type(model).__name__}
    names = list(model.state_dict())
    known = spelled(names, config)
    sizes = {name: tensor.shape[0] for name, tensor in model.state_dict().items()}
    for name in sizes:
        for end, size in rows.items():
            if name.endswith((f"{end}.weight", f"{end}.bias")):
                sizes[name] = size
    file: dict[str, Tensor] = {}
    want: dict[str, Tensor] = {}
    covered: set[str] = set()
    for number, (name, origin) in enumerate(known.items()):
        count = sum(sizes[one] for one in origin.names)
        shape = (count, 1, 1, 1) if "conv" in origin.names[0] else (count, 1)
        file[name] = torch.arange(count).float().view(shape) + 1e6 * number
        want |= dict(origin.parts(file[name], [sizes[one] for one in origin.names]))
        covered |= set(origin.names)
    for name in set(names) - covered:  # the same in both
        file[name] = want[name] = torch.rand(sizes[name], 1)
    got = convert({name: tensor.clone() for name, tensor in file.items()})
    assert got.keys() == want.keys()
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].flatten(), tensor.flatten(), msg=name)


def test_names_of_flux() -> None:
    inner = 3072
    rows = dict.fromkeys(("1.attn.to_q", "1.attn.to_k", "1.attn.to_v"), inner)
    rows |= {name.replace("1.", "0."): inner for name in rows}
    check_names(
        painting_models.flux().transformer,
        theirs.convert_flux_transformer_checkpoint_to_diffusers,
        rows | {"proj_mlp": 4 * inner},
    )


def test_names_of_z_image() -> None:
    check_names(
        painting_models.z_image().transformer,
        theirs.convert_z_image_transformer_checkpoint_to_diffusers,
        {},
    )


def test_names_of_stable_diffusion_3() -> None:
    model = painting_models.stable_diffusion_3().transformer

    def convert(file: dict[str, Tensor]) -> dict[str, Tensor]:
        wide = {"context_embedder.weight": file["context_embedder.weight"]}
        return theirs.convert_sd3_transformer_checkpoint_to_diffusers(file | wide)  # type: ignore[no-any-return]

    check_names(model, convert, {})


@pytest.mark.parametrize(
    "make", [painting_models.stable_diffusion, painting_models.stable_diffusion_xl]
)
def test_names_of_unets(make: Any) -> None:
    unet = make().unet

    def convert(file: dict[str, Tensor]) -> dict[str, Tensor]:
        prefixed = {f"{PREFIX}{name}": tensor for name, tensor in file.items()}
        config = dict(unet.config) | {"class_embed_type": None}
        found: dict[str, Tensor] = theirs.convert_ldm_unet_checkpoint(prefixed, config)
        return found

    check_names(unet, convert, {})


FAMILIES: dict[str, Callable[[], Any]] = {
    "flux": painting_models.flux,
    "z-image": painting_models.z_image,
    "qwen-image": painting_models.qwen_image,
    "sd 3.5": painting_models.stable_diffusion_3,
    "sd xl": painting_models.stable_diffusion_xl,
}


@pytest.fixture(scope="module", params=FAMILIES)
def drawn(
    request: Any, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Tensor], Tensor]:
    """(the folder without what draws, its weights by their authors' names, a picture)"""
    peer = FAMILIES[request.param]()
    folder = painting_models.saved(peer, tmp_path_factory.mktemp("folder"))
    with torch.inference_mode():
        picture = run_whole(load_pipeline(folder, Precisions()), REQUEST)
    name = "unet" if hasattr(peer, "unet") else "transformer"
    for file in (folder / name).glob("*.safetensors"):
        file.unlink()
    return folder, as_original(peer), picture


def test_a_safetensors_file_draws_the_same(
    drawn: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    folder, weights, picture = drawn
    file = tmp_path / "model.safetensors"
    others = {"first_stage_model.encoder.x": torch.ones(3), "cond_stage_model.y": torch.ones(3)}
    save_file({f"{PREFIX}{name}": x.contiguous() for name, x in weights.items()} | others, file)
    pipeline = load_pipeline(folder, Precisions(), dit_file=file)
    assert torch.equal(run_whole(pipeline, REQUEST), picture)


def test_fp8_with_scales_draws_what_the_rounded_weights_draw(
    drawn: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    folder, weights, picture = drawn
    coded: dict[str, Tensor] = {"scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn)}
    rounded: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        coded[name] = rounded[name] = tensor.contiguous()
        if tensor.ndim == 2 and name.endswith(".weight"):
            scale = tensor.abs().max() / 448.0
            coded[name] = (tensor / scale).to(torch.float8_e4m3fn).contiguous()
            coded[name.removesuffix(".weight") + ".scale_weight"] = scale.view(1)
            rounded[name] = coded[name].float() * scale
    files = tmp_path / "fp8.safetensors", tmp_path / "rounded.safetensors"
    for file, numbers in zip(files, (coded, rounded), strict=True):
        save_file(numbers, file)
    got, want = (
        run_whole(load_pipeline(folder, Precisions(), dit_file=file), REQUEST) for file in files
    )
    assert torch.equal(got, want)
    assert not torch.equal(got, picture)


def test_gguf_draws_what_its_dequantised_weights_draw(
    drawn: tuple[Path, dict[str, Tensor], Tensor], tmp_path: Path
) -> None:
    folder, weights, _ = drawn
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "tiny")
    plain: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        numbers = tensor.float().numpy()
        plain[name] = tensor.contiguous()
        if tensor.ndim == 2 and tensor.shape[1] % 32 == 0 and name.endswith(".weight"):
            kind = gguf.GGMLQuantizationType.Q8_0
            blocks = gguf.quants.quantize(numbers, kind)
            writer.add_tensor(name, blocks, raw_dtype=kind)
            plain[name] = torch.from_numpy(np.array(gguf.quants.dequantize(blocks, kind)))
        else:
            writer.add_tensor(name, numbers)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(plain, tmp_path / "plain.safetensors")
    scheme = SCHEMES.get("gguf")()
    got, want = (
        run_whole(load_pipeline(folder, precisions, dit_file=tmp_path / name), REQUEST)
        for precisions, name in (
            (Precisions(dit_scheme=scheme), "model.gguf"),
            (Precisions(), "plain.safetensors"),
        )
    )
    difference = (got.float() - want.float()).abs().mean().item()
    assert difference < 12.0, difference


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "of another model": ({"x.weight": torch.ones(3, 3)}, "does not fit"),
    "of another size": ({"double_blocks.0.img_attn.qkv.weight": torch.ones(97, 32)}, "97 rows"),
    "nunchaku's": ({"a.qweight": torch.ones(3, dtype=torch.int8)}, "SVDQuant"),
    "of bitsandbytes": ({"a.weight.absmax": torch.ones(3)}, "bitsandbytes"),
    "scales of blocks": (
        {
            "img_in.weight": torch.ones(32, 16).to(torch.float8_e4m3fn),
            "img_in.scale_weight": torch.ones(7),
        },
        "7 scales",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_wrong_file_is_refused_by_name(
    what: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = painting_models.saved(painting_models.flux(), tmp_path / "folder")
    numbers, said = BAD[what]
    save_file(numbers, tmp_path / "bad.safetensors")
    with pytest.raises(WeightError, match=said):
        load_pipeline(folder, Precisions(), dit_file=tmp_path / "bad.safetensors")
