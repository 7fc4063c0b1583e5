"""A text model and its tower in two GGUF files see what the same model's safetensors see.

Names of tensors come from the gguf library, not from sapwood's tables."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapwood.base.errors import ModelSourceError
from sapwood.multimodal.family import FamilySetting, family_of
from sapwood.schema.output import RequestOutput
from sapwood.store import fetch_model
from sapwood.store.gguf_projector import PROJECTORS
from tests.app.llms import llms_of
from tests.models.loader.test_gguf_architectures import GEMMA, add
from tests.seeing import FAMILIES, IMAGE, Seeing, Shown, ask, save, words
from tests.seeing_families import MORE
from tests.tiny import VOCAB

SIDE, PATCH, SCALE = 24, 4, 2
GEMMA_LAYERS = ["sliding_attention"] * 5 + ["full_attention"]
ALIKE = {
    "mm.soft_emb_norm.weight": "multi_modal_projector.mm_soft_emb_norm.weight",
    "mm.input_projection.weight": "multi_modal_projector.mm_input_projection_weight",
}
Change = Callable[[str, torch.Tensor], torch.Tensor]


def swapped_pairs(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """Llama's rotary halves, interleaved as llama.cpp has them."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return tensor
    return tensor.view(-1, 2, 16, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)


def larger_norms(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1 if name.endswith("norm.weight") else tensor


@dataclass(frozen=True)
class Pair:
    """How a family's two files are written.

    text, values  architecture and metadata of the text file
    change        what the converter does to the text's weights
    kind          of the projector
    keys          its metadata
    """

    family: Seeing
    text: str
    values: dict[str, Any]
    change: Change
    kind: str
    keys: dict[str, Any]


PAIRS = {
    "idefics3": Pair(
        FAMILIES["SmolVLM"],
        "llama",
        {},
        swapped_pairs,
        "idefics3",
        {"projector.scale_factor": SCALE, "preproc_image_size": 2 * SIDE},
    ),
    "gemma3": Pair(
        replace(
            MORE["Gemma 3"],
            text={
                **MORE["Gemma 3"].text,
                "num_hidden_layers": 6,
                "layer_types": GEMMA_LAYERS,
                "tie_word_embeddings": True,
            },
        ),
        "gemma3",
        {"attention.sliding_window": 24, "rope.freq_base": 1e6},
        larger_norms,
        "gemma3",
        {"projector.scale_factor": SCALE},
    ),
}


@pytest.fixture(scope="module", params=PAIRS)
def pair(request: pytest.FixtureRequest) -> Pair:
    return PAIRS[request.param]


@pytest.fixture(scope="module")
def saved(pair: Pair, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("seeing") / "model", pair.family)


@pytest.fixture(scope="module")
def written(pair: Pair, saved: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The text file; the other one lies beside it."""
    directory = tmp_path_factory.mktemp("files")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(saved / name, directory / name)
    write_text(directory / "text.gguf", pair, saved)
    write_tower(directory / "mmproj-text-f32.gguf", pair, saved)
    return directory / "text.gguf"


def write_text(path: Path, pair: Pair, saved: Path, *, token: str | None = None) -> None:
    config = json.loads((saved / "config.json").read_text())["text_config"]
    writer = gguf.GGUFWriter(str(path), pair.text)
    for key, value in {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": 1e4,
        **pair.values,
    }.items():
        add(writer, f"{pair.text}.{key}", value)
    tokens = [f"token {index}" for index in range(VOCAB)]
    tokens[IMAGE] = token or PROJECTORS[pair.kind].token
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * VOCAB)
    writer.add_token_merges([])
    arch = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == pair.text)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for name, tensor in load_file(saved / "model.safetensors").items():
        own = name
        for longer in ("model.text_model.", "language_model.model.", "model.language_model."):
            own = own.replace(longer, "model.") if own.startswith(longer) else own
        own = own.replace("language_model.lm_head", "lm_head")
        if own.startswith(("model.layers.", "model.embed", "model.norm", "lm_head")):
            writer.add_tensor(text_name(own, pair, names), pair.change(own, tensor).numpy().copy())
    finish(writer)


def text_name(name: str, pair: Pair, names: gguf.TensorNameMap) -> str:
    if pair.text == "gemma3":
        *start, part, ending = name.split(".")
        if part in GEMMA and "layers" in start:
            return f"blk.{start[2]}.{GEMMA[part]}.{ending}"
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return found


def write_tower(path: Path, pair: Pair, saved: Path, **others: Any) -> None:
    config = json.loads((saved / "config.json").read_text())
    vision = config["vision_config"]
    writer = gguf.GGUFWriter(str(path), "clip")
    add(writer, "clip.projector_type", pair.kind)
    for key, value in {
        "projection_dim": config["text_config"]["hidden_size"],
        "image_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embedding_length": vision["hidden_size"],
        "feed_forward_length": vision["intermediate_size"],
        "block_count": vision["num_hidden_layers"],
        "attention.head_count": vision["num_attention_heads"],
        "attention.layer_norm_epsilon": vision.get("layer_norm_eps", 1e-6),
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        **pair.keys,
        **others,
    }.items():
        add(writer, f"clip.vision.{key}", value)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, vision["num_hidden_layers"])
    alike = {own: name for name, own in ALIKE.items()}
    for name, tensor in load_file(saved / "model.safetensors").items():
        if (
            not any(part in name for part in ("vision", "connector", "multi_modal"))
            or ".head." in name
        ):
            continue
        own = name.removeprefix("model.")
        # transformers leaves a part of the names out that the model's publishers write.
        published = own.replace("vision_tower.", "vision_tower.vision_model.")
        found = alike.get(own)
        for one in (name, own, published):
            found = found or names.get_name(one, try_suffixes=(".weight", ".bias"))
        assert found is not None, name
        writer.add_tensor(found, (tensor + 1 if "soft_emb_norm" in name else tensor).numpy().copy())
    finish(writer)


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def prompts_of(family: Seeing) -> list[Shown]:
    one, two = (family.picture(seed, size) for seed, size in enumerate(family.sizes[:2]))
    return [
        Shown.of(family, words(7, 1), one, words(9, 2)),
        Shown.of(family, words(3, 3), two, words(2, 4), one, words(5, 5)),
        Shown(words(21, 7)),
    ]


def said(outputs: Sequence[RequestOutput]) -> tuple[list[int], list[float]]:
    """Tokens of a request, and their log probabilities."""
    told = [one.logprobs.of_tokens() for one in outputs if one.logprobs is not None]
    ids = [token_id for output in outputs for token_id in output.token_ids]
    return ids, [score for scores in told for score in scores]


def test_two_files_say_what_the_safetensors_say(pair: Pair, saved: Path, written: Path) -> None:
    prompts = prompts_of(pair.family)
    found = []
    with llms_of(saved, page_size=4, max_running_requests=4, max_total_tokens=2048) as make:
        for model in (saved, written):
            found.append([said(each) for each in ask(make(model), prompts)])
        assert found[0] == found[1]
        blind = make(written, mmproj="none")
        assert blind.generate([words(21, 7)], {"max_new_tokens": 2, "temperature": 0})


def test_pictures_are_prepared_as_the_file_says(pair: Pair, written: Path, tmp_path: Path) -> None:
    directory = fetch_model(str(written), home=tmp_path).path
    told = {
        name: json.loads((directory / f"{name}.json").read_text())
        for name in ("config", "preprocessor_config", "processor_config")
    }
    model = told["config"]
    family = family_of(
        FamilySetting(
            model_type=model["model_type"],
            image=told["preprocessor_config"],
            processor=told["processor_config"],
            model=model,
            tokens={"image": PROJECTORS[pair.kind].token},
        )
    )
    prepared = family.image(np.zeros((60, 30, 3), dtype=np.uint8), {})
    vectors = (SIDE // PATCH // SCALE) ** 2
    tiles = 3 if pair.kind == "idefics3" else 1
    assert prepared.counts == (vectors,) * tiles
    assert prepared.tensors["pixel_values"].shape == (tiles, 3, SIDE, SIDE)
    assert model["image_token_id"] == IMAGE


def test_files_that_do_not_fit_are_refused(
    pair: Pair, saved: Path, written: Path, tmp_path: Path
) -> None:
    def told(**options: Any) -> str:
        with pytest.raises(ModelSourceError) as caught:
            fetch_model(str(written), home=tmp_path / "home", **options)
        return str(caught.value)

    assert "is no file" in told(mmproj=str(tmp_path / "none.gguf"))
    assert "is no projector" in told(mmproj=str(written))
    other = tmp_path / "mmproj.gguf"
    write_tower(other, replace(pair, kind="ldpv2"), saved)
    assert "kind 'ldpv2', which sapwood does not read" in told(mmproj=str(other))
    write_tower(other, pair, saved, projection_dim=48)
    assert "makes vectors of 48 numbers" in told(mmproj=str(other))
    with pytest.raises(ModelSourceError, match="--mmproj belongs to the GGUF"):
        fetch_model(str(saved), home=tmp_path / "home", mmproj=str(other))
    write_text(tmp_path / "blind.gguf", pair, saved, token="<other>")
    write_tower(other, pair, saved)
    with pytest.raises(ModelSourceError, match="has no token"):
        fetch_model(str(tmp_path / "blind.gguf"), home=tmp_path / "home", mmproj=str(other))


def test_a_projector_that_nobody_asked_for_does_no_harm(
    pair: Pair, saved: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_text(tmp_path / "text.gguf", pair, saved)
    write_tower(tmp_path / "mmproj.gguf", replace(pair, kind="ldpv2"), saved)
    found = fetch_model(str(tmp_path / "text.gguf"), home=tmp_path / "home")
    assert [path.name for path in found.weights] == ["text.gguf"]
    assert any("only text is served" in one.message for one in caplog.records)
