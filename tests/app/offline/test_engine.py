"""`sapwood.Engine`: the calls of SGLang's own offline examples and of its engine's tests."""

from __future__ import annotations

import asyncio
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from sapwood import LLM, Engine
from sapwood.app.offline.sglang_options import engine_options
from sapwood.base.errors import ConfigError, InvalidRequest, UnsupportedFeature
from sapwood.frontends.serving.generate import EngineFailed
from tests.adapters import write_adapter
from tests.app.building.test_weights import other_weights
from tests.tiny import save_llama, save_pooled

TINY: dict[str, Any] = {
    "dtype": "float32",
    "num_threads": 1,
    "max_total_tokens": 2048,
    "page_size": 4,
    "skip_server_warmup": True,
}
PROMPTS = [
    "Hello, my name is",
    "The president of the United States is",
    "The capital of France is",
    "The future of AI is",
]
GREEDY = {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}
LONG = {**GREEDY, "max_new_tokens": 100}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("engine")


@pytest.fixture(scope="module")
def model(folder: Path) -> Path:
    sizes = {"hidden_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    return save_llama(folder / "a", num_hidden_layers=2, **sizes)


@pytest.fixture(scope="module")
def engine(model: Path) -> Iterator[Engine]:
    arguments = {
        "enable_lora": True,
        "max_lora_rank": 8,
        "enable_memory_saver": True,
        "enable_return_hidden_states": True,
        **TINY,
    }
    # As offline_batch_inference.py: all arguments of the server, most of them None.
    with Engine(model_path=str(model), tp_size=1, host="127.0.0.1", port=30000, quantization=None,
                attention_backend="triton", log_level="error", **arguments) as engine:  # fmt: skip
        yield engine


def test_a_list_of_prompts(engine: Engine) -> None:
    """offline_batch_inference.py"""
    outputs = engine.generate(PROMPTS, {"temperature": 0.8, "top_p": 0.95, "max_new_tokens": 4})
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert isinstance(output["text"], str)
        assert output["meta_info"]["prompt_tokens"] == len(prompt)
    one = engine.generate(PROMPTS[0], GREEDY)
    assert one["text"] == engine.generate([PROMPTS[0]], [GREEDY])[0]["text"]


def test_token_ids_in_and_out(engine: Engine) -> None:
    """token_in_token_out_llm_engine.py, and test_srt_engine.py's third test"""
    ids = engine.llm.services.tokenizer.encode(PROMPTS[0])
    of_text = engine.generate(PROMPTS[0], GREEDY)
    of_ids = engine.generate(input_ids=[ids], sampling_params=GREEDY)
    assert of_ids[0]["output_ids"] == of_text["output_ids"]
    for given in (np.array(ids), torch.tensor(ids)):
        assert engine.generate(input_ids=given, sampling_params=GREEDY)["text"] == of_text["text"]


def test_synchronous_and_not_streamed_and_not(engine: Engine) -> None:
    """test_srt_engine.py's fourth test"""
    expected = engine.generate("AI safety is", LONG)["text"]
    offset, parts = 0, []
    for output in engine.generate("AI safety is", LONG, stream=True):
        parts.append(output["text"][offset:])
        offset = len(output["text"])
    assert len(parts) > 1
    assert "".join(parts) == expected

    async def ask() -> list[str]:
        generator = await engine.async_generate("AI safety is", LONG, stream=True)
        texts = [output["text"] async for output in generator]
        return [(await engine.async_generate("AI safety is", LONG))["text"], texts[-1]]

    assert engine.loop.run_until_complete(ask()) == [expected, expected]


def test_many_tasks_at_once(engine: Engine) -> None:
    """offline_batch_inference_async.py: more prompts than a queue would hold are no error"""

    async def ask() -> list[Any]:
        tasks = [asyncio.create_task(engine.async_generate(one, GREEDY)) for one in PROMPTS * 10]
        return [await task for task in tasks]

    texts = [one["text"] for one in asyncio.run(ask())]
    assert texts == texts[:4] * 10


def test_log_probabilities_and_hidden_states(engine: Engine) -> None:
    """hidden_states_engine.py; numbers, not pieces of JSON"""
    outputs = engine.generate(
        PROMPTS[:2], {"max_new_tokens": 3, "n": 2, "ignore_eos": True}, return_hidden_states=True,
        return_logprob=True, top_logprobs_num=2, logprob_start_len=0,
    )  # fmt: skip
    assert len(outputs) == 4
    for output in outputs:
        meta = output["meta_info"]
        states = [torch.tensor(one) for one in meta["hidden_states"]]
        rows = torch.cat([one.unsqueeze(0) if one.dim() == 1 else one for one in states])
        assert rows.shape == (meta["prompt_tokens"] + 2, 64)
        assert len(meta["output_token_logprobs"]) == 3
        assert len(meta["input_top_logprobs"][1]) == 2


def test_scores(engine: Engine) -> None:
    scores = engine.score("Is it? ", ["Yes", "No"], [5, 9], apply_softmax=True)
    assert [round(sum(one), 5) for one in scores] == [1.0, 1.0]
    assert asyncio.run(engine.async_score("Is it? ", ["Yes", "No"], [5, 9], True)) == scores
    with pytest.raises(InvalidRequest, match="query and items"):
        engine.score(items=["a"])


def test_weights_come_and_go(engine: Engine, model: Path, folder: Path) -> None:
    """update_weights_from_{disk,tensor}, get_weights_by_name, release and resume"""
    b = other_weights(model, folder / "b")
    before = engine.generate("The oak", GREEDY)["output_ids"]
    with Engine(model_path=str(b), **TINY) as fresh:
        expected = fresh.generate("The oak", GREEDY)["output_ids"]
    assert engine.update_weights_from_disk(str(b))[::2] == (True, 0)
    assert engine.generate("The oak", GREEDY)["output_ids"] == expected
    tensors = load_file(model / "model.safetensors")
    # As a module's parameters are sent: some share memory.
    tensors["model.norm.weight"].requires_grad_(True)
    assert engine.update_weights_from_tensor(list(tensors.items()), flush_cache=True)[0]
    assert engine.generate("The oak", GREEDY)["output_ids"] == before
    done, why = engine.update_weights_from_tensor([("no.such", torch.zeros(2))])
    assert not done
    assert "no.such" in why
    rows = engine.get_weights_by_name("model.layers.1.mlp.up_proj.weight", truncate_size=2)
    assert torch.equal(torch.tensor(rows), tensors["model.layers.1.mlp.up_proj.weight"][:2].float())
    engine.release_memory_occupation(["kv_cache"])
    engine.resume_memory_occupation(["kv_cache"])
    assert engine.generate("The oak", GREEDY)["output_ids"] == before
    engine.pause_generation("retract")
    engine.continue_generation()
    with pytest.raises(InvalidRequest, match="is not released"):
        engine.resume_memory_occupation()


def test_adapters(engine: Engine, model: Path, folder: Path) -> None:
    """lora.py; answers have SGLang's attributes"""
    write_adapter(folder / "adapter", rank=4)
    tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    outcome = engine.load_lora_adapter_from_tensors("mine", list(tensors.items()), config)
    assert outcome.success, outcome.error_message
    assert list(outcome.loaded_adapters) == ["mine"]
    outputs = engine.generate(PROMPTS[:2], GREEDY, lora_path=["mine", None])
    assert outputs[1]["text"] == engine.generate(PROMPTS[1], GREEDY)["text"]
    assert outputs[0]["text"] != engine.generate(PROMPTS[0], GREEDY)["text"]
    assert not engine.load_lora_adapter("other", str(folder / "nowhere")).success
    assert engine.unload_lora_adapter("mine").success
    assert "mine" in engine.unload_lora_adapter("mine").error_message


def test_the_engine_tells_of_itself(engine: Engine, folder: Path) -> None:
    info = engine.get_server_info()
    assert info["internal_states"][0]["num_running"] == 0
    assert info["max_total_num_tokens"] == 2048
    assert engine.flush_cache().success
    engine.freeze_gc()
    engine.start_profile(output_dir=str(folder / "profile"))
    engine.generate("a", GREEDY)
    engine.stop_profile()
    assert list((folder / "profile").iterdir())
    with pytest.raises(InvalidRequest):
        engine.stop_profile()


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda e: e.collective_rpc("save_sharded_model", path="x"), "collective_rpc"),
        (lambda e: e.save_sharded_model(path="x", pattern=None, max_size=1), "save_sharded_model"),
        (lambda e: e.save_remote_model(url="redis://x"), "save_remote_model"),
        (lambda e: e.update_weights_from_ipc({"GPU-0": "ipc://x"}), "update_weights_from_ipc"),
        (lambda e: e.generate("a", audio_data="a.wav"), "audio_data"),
    ],
)
def test_what_cannot_be_is_refused_by_name(engine: Engine, call: Any, named: str) -> None:
    with pytest.raises(UnsupportedFeature, match=named):
        call(engine)


def test_an_engine_alone_hands_nothing_over(engine: Engine) -> None:
    with pytest.raises(EngineFailed, match="--disaggregation-mode prefill"):
        engine.generate("a", bootstrap_host="10.0.0.1", bootstrap_room=3)
    with pytest.raises(InvalidRequest, match="bootstrap_room"):
        engine.generate("a", bootstrap_host="10.0.0.1")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model_path": "x", "no_such": 1}, "no_such"),
        ({"model_path": "x", "cpu_offload_gb": 3}, "cpu-offload-gb"),
        ({}, "model_path"),
        ({"model_path": "x", "lora_paths": [3.5]}, "lora_paths"),
        ({"server_args": {"model_path": "x"}}, "dataclass"),
    ],
)
def test_arguments_that_cannot_be_are_refused_by_name(
    arguments: dict[str, Any], named: str
) -> None:
    with pytest.raises(ConfigError, match=named):
        engine_options(arguments)


def test_arguments_are_options() -> None:
    @dataclasses.dataclass
    class ServerArgs:
        model_path: str
        attention_backend: str | None = None
        disable_radix_cache: bool = False
        schedule_policy: str = "fcfs"
        nccl_port: int | None = None

    given = engine_options(
        {"server_args": ServerArgs("x", disable_radix_cache=True), "cpu_offload_gb": 0,
         "lora_paths": {"a": "/a", "b": "/b"}, "sampling_backend": "pytorch"}
    )  # fmt: skip
    assert given == {"model": "x", "disable_radix_cache": True, "lora_paths": "a=/a\nb=/b"}


def test_embeddings_and_pairs(tmp_path: Path) -> None:
    """embedding.py, and rerank of a cross-encoder"""
    save_pooled(tmp_path / "embed", "BertModel")
    with Engine(model_path=str(tmp_path / "embed"), is_embedding=True, **TINY) as engine:
        outputs = engine.encode(PROMPTS)
        assert [len(one["embedding"]) for one in outputs] == [64] * 4
        one = asyncio.run(engine.async_encode(PROMPTS[0]))
        assert one["embedding"] == pytest.approx(outputs[0]["embedding"], abs=1e-6)
    save_pooled(tmp_path / "pairs", "BertForSequenceClassification", num_labels=1)
    with Engine(model_path=str(tmp_path / "pairs"), **TINY) as engine:
        scored = engine.rerank([["an oak?", "a tree"], ["an oak?", "a fish"]])
        assert len({one["embedding"][0] for one in scored}) == 2


def test_an_llm_is_what_it_runs_on(engine: Engine) -> None:
    assert isinstance(engine.llm, LLM)
    [result] = engine.llm.generate([PROMPTS[0]], GREEDY)
    assert list(result.token_ids) == engine.generate(PROMPTS[0], GREEDY)["output_ids"]


def test_a_session_is_the_whole_prompt(engine: Engine) -> None:
    """test_session_control.py: equal answers, bit by bit, and the prefix comes from the cache"""
    chunks = ["Let me tell you something", " of France. The capital", " is a city that", " has"]
    asked = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}
    told = {"return_logprob": True, "logprob_start_len": -1}
    ids: list[int] = []
    whole, rid = [], None
    for chunk in chunks:
        ids += engine.llm.services.tokenizer.encode(chunk)
        whole.append(engine.generate(input_ids=ids, sampling_params=asked, **told))
        ids = ids + whole[-1]["output_ids"][:-1]
    engine.flush_cache()
    session = engine.open_session(capacity_of_str_len=1000)
    for chunk, expected in zip(chunks, whole, strict=True):
        params = {"id": session, "rid": rid, "offset": -1, "replace": True}
        answer = engine.generate(chunk, asked, session_params=params, **told)
        assert answer["output_ids"] == expected["output_ids"]
        for one, other in zip(
            answer["meta_info"]["output_token_logprobs"],
            expected["meta_info"]["output_token_logprobs"],
            strict=True,
        ):
            assert one[:2] == other[:2]
        if rid is not None:
            assert answer["meta_info"]["cached_tokens"] > 0
        rid = answer["meta_info"]["id"]
    engine.close_session(session)
    with pytest.raises(InvalidRequest, match="does not exist"):
        engine.generate("a", asked, session_params={"id": session})
