"""LoRA in every spelling beside diffusers' load_lora_weights, on tiny random pipelines."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from sapwood.base.errors import InvalidRequest, NotFound
from sapwood.pipelines.components import Precisions
from sapwood.pipelines.interface import PictureRequest, Pipeline
from sapwood.pipelines.loras import PictureAdapters
from sapwood.pipelines.registry import load_pipeline
from sapwood.pipelines.z_image import ZImagePipeline, whole_of
from sapwood.schema.painting import LoraWish
from tests import painting_models
from tests.pipelines.beside_diffusers import Drawn, alone, assert_equal, by_diffusers

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
RANK, ALPHA = 3, 6.0
COMMON: dict[str, Any] = {
    "prompt": "a red fox",
    "height": 32,
    "width": 16,
    "num_inference_steps": 2,
}

Pairs = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Loaded:
    peer: Any
    pipeline: Pipeline
    adapters: PictureAdapters
    base: Drawn = field(init=False)

    def draw(self) -> Drawn:
        steps, picture = alone(self.pipeline, PictureRequest(seed=5, **COMMON))
        if isinstance(self.pipeline, ZImagePipeline):
            size = (COMMON["height"] // 2, COMMON["width"] // 2)
            steps = [whole_of(tokens, size) for tokens in steps]
        return steps, picture

    def wanted(self, *states: dict[str, Tensor], weights: tuple[float, ...] = (1.0,)) -> Drawn:
        """With these adapters, by diffusers."""
        names = [f"a{index}" for index in range(len(states))]
        try:
            with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                for name, state in zip(names, states, strict=True):
                    normal = {key: value.clone() for key, value in state.items()}
                    self.peer.load_lora_weights(normal, adapter_name=name)
                self.peer.set_adapters(names, list(weights))
            return by_diffusers(self.peer, 5, **COMMON)
        finally:
            self.peer.unload_lora_weights()


def loaded(peer: Any, folder: Path) -> Loaded:
    painting_models.saved(peer, folder)
    adapters = PictureAdapters()
    pipeline = load_pipeline(folder, Precisions(), adapters=adapters)
    found = Loaded(peer, pipeline, adapters)
    found.base = found.draw()
    return found


def pairs_of(model: torch.nn.Module, paths: list[str], seed: int) -> Pairs:
    generator = torch.Generator().manual_seed(seed)
    found: Pairs = {}
    for path in paths:
        weight = model.get_submodule(path).weight
        out, size = weight.shape[:2]
        a = torch.randn(RANK, size, generator=generator) * size**-0.5
        b = torch.randn(out, RANK, generator=generator) * 0.3
        pixel = (1,) * (weight.ndim - 2)  # a convolution over single pixels
        found[path] = (a.view(*a.shape, *pixel), b.view(*b.shape, *pixel))
    return found


def scaled(pairs: Pairs, prefix: str) -> dict[str, Tensor]:
    """diffusers' spelling; alpha is in B."""
    found: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        found[f"{prefix}{path}.lora_A.weight"] = a
        found[f"{prefix}{path}.lora_B.weight"] = b * (ALPHA / RANK)
    return found


def with_alpha(
    pairs: Pairs, name: Callable[[str], str], ends: tuple[str, str] = (".lora_down", ".lora_up")
) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path, (a, b) in pairs.items():
        stem = name(path)
        found |= {f"{stem}{ends[0]}.weight": a, f"{stem}{ends[1]}.weight": b}
        found[f"{stem}.alpha"] = torch.tensor(ALPHA)
    return found


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


def saved_lora(state: dict[str, Tensor], path: Path, **metadata: str) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.clone().contiguous() for name, tensor in state.items()}, path, metadata)
    return str(path)


FLUX_DOUBLE, FLUX_SINGLE = "transformer_blocks.0", "single_transformer_blocks.1"
FLUX_LAYERS = [
    *(f"{FLUX_DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj")),
    f"{FLUX_DOUBLE}.ff.net.0.proj",
    f"{FLUX_DOUBLE}.norm1.linear",
    f"{FLUX_SINGLE}.proj_out",
    "x_embedder",
]
SAME_A = [f"{FLUX_SINGLE}.{name}" for name in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")]


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    with torch.inference_mode():
        return loaded(painting_models.flux(), tmp_path_factory.mktemp("flux"))


@pytest.fixture(scope="module")
def flux_pairs(flux: Loaded) -> Pairs:
    found = pairs_of(flux.peer.transformer, [*FLUX_LAYERS, *SAME_A], 1)
    return found | {path: (found[SAME_A[0]][0], found[path][1]) for path in SAME_A}


@pytest.fixture(scope="module")
def flux_wanted(flux: Loaded, flux_pairs: Pairs) -> Drawn:
    with torch.inference_mode():
        return flux.wanted(scaled(flux_pairs, "transformer."))


def flux_originals(pairs: Pairs) -> Pairs:
    """The same under the names of Flux's authors, whose layers are fused."""
    block, single = "double_blocks.0", "single_blocks.1"
    renamed = {
        f"{FLUX_DOUBLE}.attn.to_out.0": f"{block}.img_attn.proj",
        f"{FLUX_DOUBLE}.ff.net.0.proj": f"{block}.img_mlp.0",
        f"{FLUX_DOUBLE}.norm1.linear": f"{block}.img_mod.lin",
        f"{FLUX_SINGLE}.proj_out": f"{single}.linear2",
        "x_embedder": "img_in",
    }
    found = {theirs: pairs[ours] for ours, theirs in renamed.items()}
    found[f"{single}.linear1"] = (
        pairs[SAME_A[0]][0],
        torch.cat([pairs[path][1] for path in SAME_A]),
    )
    # Layers with an A of their own each: rank after rank, and B is zero outside its block.
    for name, members in (
        ("img_attn", ("to_q", "to_k", "to_v")),
        ("txt_attn", ("add_q_proj", None, None)),
    ):
        chosen = [pairs[f"{FLUX_DOUBLE}.attn.{one}"] if one else None for one in members]
        size = pairs[f"{FLUX_DOUBLE}.attn.to_q"][1].shape[0]
        a = torch.cat([own[0] for own in chosen if own is not None])
        b = torch.zeros(3 * size, len(a))
        for index, own in enumerate(chosen):
            if own is not None:
                b[index * size :][:size, index * RANK :][:, :RANK] = own[1]
        # The scale is alpha / rank, and the rank is larger here.
        found[f"{block}.{name}.qkv"] = (a, b * (len(a) / RANK))
    return found


FLUX_SPELLINGS: dict[str, Callable[[Pairs], dict[str, Tensor]]] = {
    "diffusers": lambda pairs: scaled(pairs, "transformer."),
    "peft with its adapter's name": lambda pairs: {
        name.replace(".weight", ".default.weight"): tensor
        for name, tensor in scaled(pairs, "base_model.model.").items()
    },
    "no prefix, down and up": lambda pairs: with_alpha(pairs, str),
    "diffusers' first": lambda pairs: {
        name.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): tensor
        for name, tensor in scaled(pairs, "transformer.").items()
    },
    "kohya": lambda pairs: with_alpha(flux_originals(pairs), kohya),
    "comfy": lambda pairs: with_alpha(
        flux_originals(pairs), lambda path: f"diffusion_model.{path}", (".lora_A", ".lora_B")
    ),
}


@pytest.mark.parametrize("spelling", FLUX_SPELLINGS)
def test_each_spelling_draws_what_diffusers_draws(
    spelling: str, flux: Loaded, flux_pairs: Pairs, flux_wanted: Drawn, tmp_path: Path
) -> None:
    path = saved_lora(FLUX_SPELLINGS[spelling](flux_pairs), tmp_path / "lora.safetensors")
    flux.adapters.set([LoraWish(nickname=spelling, path=path)])
    got = flux.draw()
    assert_equal(got, flux_wanted)
    assert (got[1].int() - flux.base[1].int()).abs().max() > 3, "the adapter changes the picture"


def test_switched_off_it_gives_the_old_bits_back(
    flux: Loaded, flux_pairs: Pairs, flux_wanted: Drawn, tmp_path: Path
) -> None:
    path = saved_lora(scaled(flux_pairs, "transformer."), tmp_path / "lora.safetensors")
    flux.adapters.set([LoraWish(nickname="one", path=path, strength=0.5)])
    flux.adapters.unmerge("all")
    assert flux.adapters.listing().active == {}
    assert torch.equal(flux.draw()[0][-1], flux.base[0][-1])
    flux.adapters.merge("transformer", 1.0)
    assert_equal(flux.draw(), flux_wanted)
    (active,) = flux.adapters.listing().active["transformer"]
    assert (active.nickname, active.strength, active.path) == ("one", 1.0, path)
    flux.adapters.set([LoraWish(nickname="one", strength=0.0)])
    assert_equal(flux.draw(), flux.base)


def test_several_add_with_strengths_of_their_own(flux: Loaded, tmp_path: Path) -> None:
    both = [pairs_of(flux.peer.transformer, FLUX_LAYERS[:6], seed) for seed in (1, 2)]
    states = [scaled(pairs, "transformer.") for pairs in both]
    wishes = [
        LoraWish(
            nickname=f"a{index}",
            path=saved_lora(state, tmp_path / f"{index}.safetensors"),
            strength=strength,
        )
        for index, (state, strength) in enumerate(zip(states, (0.5, -1.5), strict=True))
    ]
    flux.adapters.set(wishes)
    assert_equal(flux.draw(), flux.wanted(*states, weights=(0.5, -1.5)))


def test_a_folder_of_peft_says_alpha_in_its_configuration(
    flux: Loaded, flux_pairs: Pairs, flux_wanted: Drawn, tmp_path: Path
) -> None:
    plain = {
        f"base_model.model.{path}.lora_{which}.weight": tensor
        for path, pair in flux_pairs.items()
        for which, tensor in zip("AB", pair, strict=True)
    }
    saved_lora(plain, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    flux.adapters.set([LoraWish(nickname="peft", path=str(tmp_path))])
    assert_equal(flux.draw(), flux_wanted)
    told = {f"transformer.{name}": value for name, value in config.items()}
    state = {name.replace("base_model.model", "transformer"): x for name, x in plain.items()}
    path = saved_lora(
        state, tmp_path / "a" / "x.safetensors", lora_adapter_metadata=json.dumps(told)
    )
    flux.adapters.set([LoraWish(nickname="metadata", path=path)])
    assert_equal(flux.draw(), flux_wanted)


def others() -> dict[str, tuple[Callable[[], Any], list[str], Callable[[str], str]]]:
    z_image = [
        "layers.1.attention.to_k",
        "layers.0.attention.to_out.0",
        "layers.1.feed_forward.w3",
        "noise_refiner.0.attention.to_q",
        "context_refiner.0.feed_forward.w2",
        "layers.0.adaLN_modulation.0",
    ]
    qwen = [
        "transformer_blocks.1.attn.to_q",
        "transformer_blocks.0.attn.add_v_proj",
        "transformer_blocks.0.attn.to_add_out",
        "transformer_blocks.1.img_mlp.net.0.proj",
        "transformer_blocks.1.txt_mod.1",
        "proj_out",
    ]
    unet = [
        "down_blocks.1.attentions.0.transformer_blocks.1.attn1.to_q",
        "up_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k",
        "up_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
        "mid_block.attentions.0.proj_in",
        "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0",
    ]
    sgm = {
        "down_blocks.1.attentions.0": "input_blocks.3.1",
        "up_blocks.0.attentions.0": "output_blocks.0.1",
        "mid_block.attentions.0": "middle_block.1",
    }

    def of_sgm(path: str) -> str:
        for ours, theirs in sgm.items():
            path = path.replace(ours, theirs)
        return kohya(path)

    sd15 = [
        "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_v",
        "down_blocks.0.attentions.0.proj_in",
        "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.2",
    ]
    return {
        "z-image": (painting_models.z_image, z_image, lambda path: f"diffusion_model.{path}"),
        "qwen-image": (painting_models.qwen_image, qwen, kohya),
        "sd xl": (painting_models.stable_diffusion_xl, unet, of_sgm),
        "sd 1.5": (painting_models.stable_diffusion, sd15, kohya),
    }


@pytest.mark.parametrize("family", ["z-image", "qwen-image", "sd xl", "sd 1.5"])
def test_other_families(family: str, tmp_path: Path) -> None:
    make, layers, spelled = others()[family]
    model = loaded(make(), tmp_path / "model")
    is_unet = family.startswith("sd")
    pairs = pairs_of(model.peer.unet if is_unet else model.peer.transformer, layers, 1)
    own = scaled(pairs, "unet." if is_unet else "transformer.")
    state = with_alpha(pairs, spelled)
    if is_unet:
        clip = [
            "text_model.encoder.layers.0.self_attn.q_proj",
            "text_model.encoder.layers.1.mlp.fc2",
        ]
        names = ["text_encoder", "text_encoder_2"] if family == "sd xl" else ["text_encoder"]
        for index, name in enumerate(names):
            layers_of = {each.removeprefix("text_model."): each for each in clip}
            found = pairs_of(_text_model(getattr(model.peer, name)), list(layers_of), 2 + index)
            texts = {layers_of[path]: pair for path, pair in found.items()}
            own |= scaled(texts, f"{name}.")
            start = f"lora_te{index + 1}_" if family == "sd xl" else "lora_te_"
            state |= with_alpha(texts, lambda path, s=start: s + path.replace(".", "_"))
    want = model.wanted(own)
    path = saved_lora(state, tmp_path / "lora.safetensors")
    model.adapters.set([LoraWish(nickname="it", path=path)])
    assert_equal(model.draw(), want)
    assert (want[1].int() - model.base[1].int()).abs().max() > 3
    if is_unet:
        only = model.wanted({k: v for k, v in own.items() if k.startswith("unet.")})
        model.adapters.set([LoraWish(nickname="it", target="transformer")])
        assert_equal(model.draw(), only)


def _text_model(encoder: Any) -> Any:
    return getattr(encoder, "text_model", encoder)


A, B = torch.ones(RANK, 32), torch.ones(32, RANK)
Q = f"transformer.{FLUX_DOUBLE}.attn.to_q"
BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "no layer of this model": ({"transformer.x.lora_A.weight": A, "transformer.x.lora_B.weight": B},
                               "has not"),
    "of another size": ({f"{Q}.lora_A.weight": torch.ones(3, 33), f"{Q}.lora_B.weight": B}, "33"),
    "half of a pair": ({f"{Q}.lora_A.weight": A}, "without its lora_B"),
    "ranks that differ": ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": torch.ones(32, 4)}, "32"),
    "rank 0": ({f"{Q}.lora_A.weight": A[:0], f"{Q}.lora_B.weight": B[:, :0]}, "is"),
    "DoRA": ({f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.dora_scale": A}, "DoRA"),
    "LoHa": ({"lora_unet_x.hada_w1_a": A}, "LoHa"),
    "an alpha that is no number": (
        {f"{Q}.lora_A.weight": A, f"{Q}.lora_B.weight": B, f"{Q}.alpha": A[0, :1] * float("nan")},
        "finite",
    ),
    "integers": ({f"{Q}.lora_A.weight": A.int(), f"{Q}.lora_B.weight": B.int()}, "linear layers"),
    "a convolution": (
        {f"{Q}.lora_A.weight": torch.ones(3, 32, 3, 3), f"{Q}.lora_B.weight": B},
        "convolution",
    ),
    "nothing": ({"x": A}, "no LoRA adapter has"),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_what_is_no_adapter_is_refused_and_changes_nothing(
    what: str, flux: Loaded, tmp_path: Path
) -> None:
    flux.adapters.set([])
    state, said = BAD[what]
    path = saved_lora(state, tmp_path / "bad.safetensors")
    with pytest.raises(InvalidRequest, match=said) as error:
        flux.adapters.set([LoraWish(nickname="bad", path=path)])
    assert error.value.param == "lora_path"
    assert "bad" not in [one.nickname for one in flux.adapters.listing().loaded_adapters]
    assert torch.equal(flux.draw()[0][-1], flux.base[0][-1])


def test_bytes_that_are_no_file_are_refused(flux: Loaded, tmp_path: Path) -> None:
    bad = tmp_path / "bad.safetensors"
    for content in (b"", b"\xff" * 100, (2**63).to_bytes(8, "little") + b"{}"):
        bad.write_bytes(content)
        with pytest.raises(InvalidRequest, match="cannot be read"):
            flux.adapters.set([LoraWish(nickname="bad", path=str(bad))])
    pickled = tmp_path / "bad.bin"
    pickled.write_bytes(b"x")
    for path, said in ((pickled, "no safetensors"), (tmp_path / "none", "no LoRA file")):
        with pytest.raises(InvalidRequest, match=said):
            flux.adapters.set([LoraWish(nickname="bad", path=str(path))])
    with pytest.raises(NotFound, match="give its lora_path"):
        flux.adapters.set([LoraWish(nickname="never seen")])
    with pytest.raises(InvalidRequest, match="one of transformer"):
        flux.adapters.set([LoraWish(nickname="x", path="x", target="transformer_2")])
    flux.adapters.set([])
    with pytest.raises(InvalidRequest, match="no LoRA adapter is set"):
        flux.adapters.merge("all", None)
