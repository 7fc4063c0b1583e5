from __future__ import annotations

import json
import os

import numpy as np
import pytest
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sapwood.base.errors import ModelSourceError
from sapwood.store.gguf_architectures import ARCHITECTURES
from sapwood.store.prepare import prepare_gguf
from sapwood.store.progress import Silent
from tests.gguf_sample import GgufSample


@pytest.fixture
def prepare(tmp_path):
    def prepare(sample, name="m.gguf", sha256=None):
        path = sample.write(tmp_path / name)
        return prepare_gguf([path], home=tmp_path / "home", sha256=sha256, progress=Silent())

    return prepare


def read(directory, name="config.json"):
    return json.loads((directory / name).read_text())


@pytest.mark.parametrize("architecture", ["llama", "mistral3", "qwen2", "qwen3"])
def test_the_config_is_in_the_layout_of_hugging_face(prepare, architecture):
    directory = prepare(GgufSample(architecture=architecture))
    config = AutoConfig.from_pretrained(directory)
    assert config.architectures == [ARCHITECTURES[architecture].class_name]
    assert config.model_type == ARCHITECTURES[architecture].model_type
    expected = {
        "hidden_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "intermediate_size": 512,
        "vocab_size": 262,
        "rms_norm_eps": 1e-5,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 0,
    }
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.rope_parameters["rope_theta"] == 10000.0


def test_tensors_say_whether_embeddings_are_tied_and_biases_there(prepare):
    sample = GgufSample(architecture="qwen2")
    sample.tensors["output.weight"] = np.ones((262, 256), dtype=np.float32)
    sample.tensors["blk.0.attn_q.bias"] = np.ones(256, dtype=np.float32)
    config = read(prepare(sample))
    assert config["tie_word_embeddings"] is False
    assert config["attention_bias"] is True
    assert config["mlp_bias"] is False


def test_head_size_may_differ_from_the_hidden_size_per_head(prepare):
    values = {"attention.key_length": 128, "attention.value_length": 128}
    assert read(prepare(GgufSample(values=values)))["head_dim"] == 128


def test_eos_lists_every_token_that_ends_an_answer(prepare):
    values = {"tokenizer.ggml.eot_token_id": 5, "tokenizer.ggml.eom_token_id": 0}
    generation = read(prepare(GgufSample(values=values)), "generation_config.json")
    assert generation == {"bos_token_id": 1, "eos_token_id": [0, 5]}


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        (
            {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
            {"rope_type": "linear", "factor": 4.0},
        ),
        ({"rope.scale_linear": 2.0}, {"rope_type": "linear", "factor": 2.0}),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 128,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 128,
                "beta_fast": 16.0,
            },
        ),
    ],
)
def test_rope_scaling(prepare, values, expected):
    assert read(prepare(GgufSample(values=values))).get("rope_scaling") == expected


def test_the_factors_of_llama_3_are_recognised(prepare):
    sample = GgufSample(values={"rope.freq_base": 500000.0})
    scaling = {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = AutoConfig.for_model(
        "llama",
        hidden_size=256,
        num_attention_heads=4,
        rope_parameters={"rope_theta": 500000.0, **scaling},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 500000.0 ** (-np.arange(0, 64, 2) / 64)
    sample.tensors["rope_freqs.weight"] = (plain / scaled.numpy()).astype(np.float32)
    assert read(prepare(sample))["rope_scaling"] == scaling


def test_other_factors_are_passed_on_as_they_are(prepare):
    sample = GgufSample()
    factors = np.linspace(1, 3, 32, dtype=np.float32)
    sample.tensors["rope_freqs.weight"] = factors
    scaling = read(prepare(sample))["rope_scaling"]
    assert scaling["rope_type"] == "longrope"
    assert scaling["attention_factor"] == 1.0
    assert np.array_equal(np.float32(scaling["short_factor"]), factors)
    assert scaling["short_factor"] == scaling["long_factor"]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"expert_count": 8}, "lacks llama.expert_used_count"),
        ({"attention.clamp_kqv": 8.0}, "llama.attention.clamp_kqv = 8.0"),
        ({"rope.scaling.type": "longrope", "rope.scaling.factor": 2.0}, "'longrope'"),
        ({"attention.sliding_window": 64}, "sliding window of 64"),
        ({"attention.key_length": 64, "attention.value_length": 32}, "keys of 64 and values of 32"),
        ({"attention.head_count_kv": [2, 1]}, "head_count_kv differs between layers"),
        ({"split.count": 3}, "is one of 3 files"),
        ({"tokenizer.ggml.pre": "klingon"}, "tokenizer.ggml.pre is 'klingon'; known: "),
    ],
)
def test_what_cannot_be_served_is_refused(prepare, values, message):
    sample = GgufSample(values=values)
    if "tokenizer.ggml.pre" in values:
        sample.pre = None
    with pytest.raises(ModelSourceError, match=message):
        prepare(sample)


def test_an_unknown_architecture_lists_the_known_ones(prepare):
    with pytest.raises(ModelSourceError, match=r"'rwkv7'.*known: llama, mistral3, qwen2, qwen3"):
        prepare(GgufSample(architecture="rwkv7"))


def test_missing_metadata_is_named(prepare):
    sample = GgufSample()
    sample.left_out.add("token_embd.weight")
    with pytest.raises(ModelSourceError, match=r"no token_embd\.weight"):
        prepare(sample)


def test_a_failed_preparation_leaves_nothing(prepare, tmp_path):
    with pytest.raises(ModelSourceError):
        prepare(GgufSample(tokenizer="wordpiece"))
    assert not (tmp_path / "home" / "prepared").exists()
    assert not list((tmp_path / "home" / "staging").iterdir())


def test_a_changed_file_is_prepared_again(prepare, tmp_path):
    first = prepare(GgufSample())
    assert (
        prepare_gguf([tmp_path / "m.gguf"], home=tmp_path / "home", sha256=None, progress=Silent())
        == first
    )
    os.utime(tmp_path / "m.gguf", ns=(1, 1))
    again = prepare_gguf(
        [tmp_path / "m.gguf"], home=tmp_path / "home", sha256=None, progress=Silent()
    )
    assert again != first


def test_a_known_checksum_identifies_a_file_wherever_it_lies(prepare, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    first = prepare(GgufSample(), sha256="0" * 64)
    assert prepare(GgufSample(), name="elsewhere/m.gguf", sha256="0" * 64) == first


def test_a_tokenizer_beside_the_file_is_taken_instead(prepare, tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"own": true}')
    directory = prepare(GgufSample(pre="klingon"))
    assert read(directory, "tokenizer.json") == {"own": True}


def test_a_model_without_a_vocabulary_has_no_tokenizer(prepare):
    directory = prepare(GgufSample(tokenizer=None))
    assert not (directory / "tokenizer.json").exists()
    assert (directory / "config.json").exists()


def test_chat_templates_become_files(prepare):
    values = {
        "tokenizer.chat_template": "{{ messages }}",
        "tokenizer.chat_template.tool_use": "{{ tools }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    directory = prepare(GgufSample(values=values))
    assert (directory / "chat_template.jinja").read_text() == "{{ messages }}"
    named = directory / "additional_chat_templates" / "tool_use.jinja"
    assert named.read_text() == "{{ tools }}"
    assert len(list(named.parent.iterdir())) == 1


def test_a_split_model_is_prepared_as_one(tmp_path):
    weights = GgufSample().weights()
    later = {name for name in weights if name.startswith("blk.1.")}
    first, second = GgufSample(values={"split.count": 2}), GgufSample(tokenizer=None)
    first.left_out, second.left_out = later, set(weights) - later
    paths = [
        first.write(tmp_path / "m-00001-of-00002.gguf"),
        second.write(tmp_path / "m-00002-of-00002.gguf"),
    ]
    directory = prepare_gguf(paths, home=tmp_path / "home", sha256=None, progress=Silent())
    rows = read(directory, "tensors.json")["tensors"]
    assert {row["name"]: row["file"] for row in rows} == {
        name: int(name in later) for name in weights
    }
