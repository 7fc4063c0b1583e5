import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from sapwood.base.errors import ConfigError, ModelSourceError
from sapwood.bench.offline import Generated
from sapwood.bench.peers.conversion import checkpoint_directory
from sapwood.bench.peers.interface import PeerSetup
from sapwood.bench.peers.process import PeerProcess
from sapwood.bench.peers.transformers_peer import TransformersGenerator
from sapwood.bench.workloads.vocabulary import TokenVocabulary
from sapwood.bench.workloads.workload import FixedLengths, WorkloadSpec
from sapwood.store import ModelFiles, Silent

CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 128,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()


def test_outputs_have_their_full_length_whatever_the_model_says(model):
    prompt = list(range(20, 28))
    with torch.inference_mode():
        first = int(model(torch.tensor([prompt])).logits[0, -1].argmax())
    # The very first greedy token would end the output if it were not ignored.
    model.generation_config.eos_token_id = first
    generator = TransformersGenerator(model)
    assert generator.generate([prompt, prompt[:3]], [7, 7]) == [Generated(num_output_tokens=7)] * 2


def test_outputs_of_several_lengths_are_refused(model):
    with pytest.raises(ConfigError, match="one output length"):
        TransformersGenerator(model).generate([[1], [2]], [3, 4])


def test_a_checkpoint_is_served_by_a_process_of_its_own(model, tmp_path):
    model.save_pretrained(tmp_path)
    setup = PeerSetup(model_dir=str(tmp_path), dtype="float32", num_threads=1)
    spec = WorkloadSpec(
        name="x", title="x", shape=FixedLengths(num_requests=2, prompt_tokens=6, output_tokens=4)
    )
    workload = spec.generate(TokenVocabulary(tuple(range(10, 120))), seed=0)
    with PeerProcess("transformers", setup, timeout_s=120.0, env=dict(os.environ)) as peer:
        result = peer.run(workload)
        facts = peer.facts()
    assert result.num_output_tokens == (4, 4)
    assert result.wall_s > 0
    assert {"torch", "transformers"} <= set(facts.versions)
    assert facts.peak_rss_bytes > 50 * 2**20


def files(path, weights, weight_format):
    return ModelFiles(name="m", path=path, weights=weights, weight_format=weight_format)


def directory_of(model_files, home):
    return checkpoint_directory(
        model_files, home=home, dtype="float32", env=dict(os.environ), progress=Silent()
    )


def test_a_checkpoint_needs_no_conversion(tmp_path):
    weights = (tmp_path / "model.safetensors",)
    assert directory_of(files(tmp_path, weights, "safetensors"), tmp_path / "home") == tmp_path
    assert not (tmp_path / "home").exists()


def test_models_that_cannot_be_compared_are_refused(tmp_path):
    with pytest.raises(ModelSourceError, match="no weights"):
        directory_of(files(tmp_path, (), "none"), tmp_path)
    parts = (tmp_path / "1.gguf", tmp_path / "2.gguf")
    with pytest.raises(ModelSourceError, match="2 parts"):
        directory_of(files(tmp_path, parts, "gguf"), tmp_path)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"GGUF but not really")
    with pytest.raises(ModelSourceError, match="could not convert"):
        directory_of(files(tmp_path / "prepared", (broken,), "gguf"), tmp_path)
    assert not (tmp_path / "bench").exists()


def write_gguf(path: Path, model: LlamaForCausalLM) -> None:
    """The model as a GGUF file in float32, with a byte-level vocabulary of 128 letters."""
    gguf = pytest.importorskip("gguf", reason="gguf writes the file that is converted")
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_block_count(2)
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(128)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(["<s>", "</s>", *(chr(0x100 + index) for index in range(126))])
    writer.add_token_types([3, 3] + [1] * 126)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    names = {
        "model.embed_tokens": "token_embd",
        "model.norm": "output_norm",
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        stem = name.removesuffix(".weight")
        if stem == "lm_head":
            continue
        layer, _, rest = stem.removeprefix("model.layers.").partition(".")
        target = f"blk.{layer}.{names[rest]}" if rest in names else names[stem]
        writer.add_tensor(f"{target}.weight", tensor.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_is_converted_once(model, tmp_path):
    gguf = tmp_path / "tiny.gguf"
    write_gguf(gguf, model)
    prepared = tmp_path / "prepared-key"
    prepared.mkdir()
    (prepared / "tokenizer.json").write_text("{}")
    model_files = files(prepared, (gguf,), "gguf")
    target = directory_of(model_files, tmp_path / "home")
    assert target.name == "prepared-key-float32"
    assert (target / "tokenizer.json").read_text() == "{}"
    loaded = AutoModelForCausalLM.from_pretrained(target)
    assert torch.equal(loaded.get_input_embeddings().weight, model.get_input_embeddings().weight)
    gguf.unlink()
    assert directory_of(model_files, tmp_path / "home") == target
