from __future__ import annotations

import warnings

import gguf
import numpy as np
import pytest
import torch
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from sapwood.base.errors import WeightError
from sapwood.models.loader import gguf as reader
from sapwood.models.loader.weights import iterate_weights
from sapwood.store import fetch_model
from sapwood.store.gguf_header import TENSOR_TYPES
from tests.gguf_sample import GgufSample
from tests.tiers import sweep

QUANTISABLE = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0")
HEADS = {"attn_q": 4, "attn_k": 2}


@pytest.fixture
def load(tmp_path):
    def load(sample, dtype=torch.float32):
        path = sample.write(tmp_path / "m.gguf")
        files = fetch_model(str(path), home=tmp_path / "home")
        pairs = list(iterate_weights(files, dtype=dtype))
        assert len(pairs) == len(dict(pairs))
        return dict(pairs)

    return load


def to_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a rotary projection as llama.cpp's converter orders them: half pairs interleaved."""
    return rows.reshape(heads, 2, -1, rows.shape[1]).swapaxes(1, 2).reshape(rows.shape)


def from_llama_cpp(rows: np.ndarray, heads: int) -> np.ndarray:
    """The same undone row by row, slowly and plainly."""
    size = len(rows) // heads
    out = np.empty_like(rows)
    for head in range(heads):
        for row in range(size):
            stored = 2 * row if row < size // 2 else 2 * (row - size // 2) + 1
            out[head * size + row] = rows[head * size + stored]
    return out


def expected_names(sample) -> dict[str, str]:
    return {reader.hf_name(name, {}): name for name in sample.weights()}


def part(name: str) -> str:
    return name.split(".")[2] if name.startswith("blk.") else name


def test_names_are_those_of_hugging_face(load):
    loaded = load(GgufSample())
    layer = {
        "input_layernorm",
        "post_attention_layernorm",
        *(f"self_attn.{name}_proj" for name in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    }
    layers = {f"model.layers.{number}.{name}.weight" for number in range(2) for name in layer}
    assert set(loaded) == {"model.embed_tokens.weight", "model.norm.weight", *layers}


def test_rotary_rows_of_llama_are_put_back_in_order(load):
    sample = GgufSample()
    wanted = {}
    for name, weight in sample.weights().items():
        wanted[reader.hf_name(name, {})] = weight
        if part(name) in HEADS:
            sample.tensors[name] = to_llama_cpp(weight, HEADS[part(name)])
    bias = np.arange(256, dtype=np.float32)
    sample.tensors["blk.0.attn_q.bias"] = to_llama_cpp(bias[:, None], 4)[:, 0].copy()
    wanted["model.layers.0.self_attn.q_proj.bias"] = bias
    loaded = load(sample)
    assert set(loaded) == set(wanted)
    for name, weight in wanted.items():
        assert np.array_equal(loaded[name].numpy(), weight), name


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_rows_of_qwen_stay_as_they_are(load, architecture):
    sample = GgufSample(architecture=architecture)
    sample.tensors["blk.1.attn_q.bias"] = np.arange(256, dtype=np.float32)
    sample.tensors["blk.1.attn_k_norm.weight"] = np.arange(64, dtype=np.float32)
    sample.tensors["output.weight"] = np.ones((262, 256), dtype=np.float32)
    loaded = load(sample)
    for name, original in expected_names(sample).items():
        assert np.array_equal(loaded[name].numpy(), sample.weights()[original])
    assert loaded["model.layers.1.self_attn.q_proj.bias"][5] == 5
    assert loaded["model.layers.1.self_attn.k_norm.weight"][5] == 5
    assert loaded["lm_head.weight"].shape == (262, 256)


@pytest.mark.parametrize("kind", QUANTISABLE)
def test_quantised_weights_are_what_gguf_makes_of_them(load, kind):
    qtype = GGMLQuantizationType[kind]
    sample = GgufSample()
    wanted = sample.weights()
    for name, weight in sample.weights().items():
        if weight.ndim == 2:
            data = gguf.quantize(weight, qtype)
            # The writer takes 16-bit floats by value and everything else by its bytes.
            sample.raw[name] = (data, qtype)
            wanted[name] = gguf.dequantize(data, qtype)
            if part(name) in HEADS:
                wanted[name] = from_llama_cpp(wanted[name], HEADS[part(name)])
    loaded = load(sample)
    for name, original in expected_names(sample).items():
        assert loaded[name].dtype == torch.float32
        assert np.array_equal(loaded[name].numpy(), wanted[original]), name


def random_bytes(kind: str, num_rows: int, num_columns: int) -> np.ndarray:
    """Quantised rows of random bits, whose 16-bit scales are small numbers: no infinities."""
    numbers, num_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    rng = np.random.default_rng(3)
    data = rng.integers(0, 256, (num_rows, num_columns // numbers * num_bytes), dtype=np.uint8)
    return data & 0xBF  # clears the top exponent bit of every byte that may be part of a scale


@sweep(
    strength=1,
    kind=[name for name in TENSOR_TYPES if name not in ("F32", "F16")],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
)
def test_every_type_is_read_from_its_bits(load, kind, dtype):
    qtype = GGMLQuantizationType[kind]
    sample = GgufSample()
    # More than one piece, and a last piece that is not full.
    sample.tokens += [f"token{number}" for number in range(1300 - len(sample.tokens))]
    data = random_bytes(kind, 1300, 256)
    sample.raw["token_embd.weight"] = (data, qtype)
    loaded = load(sample, dtype)["model.embed_tokens.weight"]
    wanted = torch.from_numpy(gguf.dequantize(data, qtype).reshape(1300, 256)).to(dtype)
    assert loaded.dtype == dtype
    assert wanted.abs().sum() > 0
    assert torch.equal(loaded, wanted)


def test_a_tensor_that_nobody_knows_is_named(load):
    sample = GgufSample()
    sample.tensors["blk.0.ssm_conv1d.weight"] = np.ones(4, dtype=np.float32)
    with pytest.raises(WeightError, match=r"blk\.0\.ssm_conv1d\.weight.*architecture llama"):
        load(sample)


def test_rope_factors_are_configuration_and_no_weights(load):
    sample = GgufSample()
    sample.tensors["rope_freqs.weight"] = np.full(32, 2.0, dtype=np.float32)
    assert set(load(sample)) == set(expected_names(sample))


def test_a_file_that_shrank_after_it_was_prepared_is_named(tmp_path):
    path = GgufSample().write(tmp_path / "m.gguf")
    files = fetch_model(str(path), home=tmp_path / "home")
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(WeightError, match=r"m\.gguf ends before byte \d+, up to which"):
        list(iterate_weights(files, dtype=torch.float32))


def test_a_prepared_directory_without_its_table_says_what_to_do(tmp_path):
    path = GgufSample().write(tmp_path / "m.gguf")
    files = fetch_model(str(path), home=tmp_path / "home")
    (files.path / "tensors.json").unlink()
    with pytest.raises(WeightError, match=r"tensors\.json cannot be read.*remove"):
        list(iterate_weights(files, dtype=torch.float32))


def test_names_that_are_none_of_ours():
    assert reader.hf_name("blk.12.ffn_up.weight", {}) == "model.layers.12.mlp.up_proj.weight"
    assert reader.hf_name("blk.x.ffn_up.weight", {}) is None
    assert reader.hf_name("v.blk.0.attn_q.weight", {}) is None
    assert reader.hf_name("token_types.weight", {}) is None
    own = {"ffn_up": "mlp.fc1", "output_norm": "model.last"}
    assert reader.hf_name("blk.12.ffn_up.bias", own) == "model.layers.12.mlp.fc1.bias"
    assert reader.hf_name("output_norm.weight", own) == "model.last.weight"


@pytest.mark.long
def test_smollm2_has_the_names_and_values_that_transformers_loads(smollm2_files):
    """Else tests/smollm2.py, with which real outputs are compared, proves nothing."""
    from transformers import AutoModelForCausalLM

    from tests.smollm2 import CONFIG

    file = smollm2_files.weights[0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
    theirs = dict(model.named_parameters())  # names the tied lm_head once, as the embedding
    ours = dict(iterate_weights(smollm2_files, dtype=torch.float32))
    assert set(ours) == set(theirs)
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    for key in (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "vocab_size",
        "rope_parameters",
        "tie_word_embeddings",
    ):
        assert getattr(CONFIG, key) == getattr(model.config, key), key
    assert CONFIG.rms_norm_eps == pytest.approx(model.config.rms_norm_eps)
