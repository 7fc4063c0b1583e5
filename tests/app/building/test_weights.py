"""Weights that change while an engine serves: the engine then is one that started with them."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import safetensors.torch
import torch
from safetensors.torch import load_file
from torch import Tensor

from sapwood import LLM
from sapwood.base.errors import InvalidRequest
from sapwood.frontends.serving.control import go_on, order_weights, pause
from sapwood.schema.output import CallDone
from sapwood.schema.weights import (
    CheckWeights,
    JoinUpdateGroup,
    LeaveUpdateGroup,
    ReadWeight,
    ReleaseMemory,
    ResumeMemory,
    UpdateFromDisk,
    UpdateFromGroup,
    UpdateFromTensors,
    WeightOrder,
)
from tests.adapters import write_adapter
from tests.app.llms import llms_of
from tests.app.test_hidden_states import GREEDY, generate
from tests.app.test_logprobs import ask
from tests.tiny import save_llama, save_qwen3, save_qwen3_moe

TEXT = [7, 40, 200, 31, 8, 99, 14, 3, 150, 64]
Numbers = tuple[list[int], bytes]
"""Generated tokens, and fp32 log probabilities"""


@dataclass(frozen=True)
class Pair:
    """Two checkpoints of one shape."""

    a: Path
    b: Path

    def tensors(self, which: Path) -> dict[str, Tensor]:
        return load_file(which / "model.safetensors")


def other_weights(source: Path, target: Path) -> Path:
    """The same model with other numbers."""
    target.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (target / file.name).write_bytes(file.read_bytes())
    weights = load_file(source / "model.safetensors")
    turned = {name: torch.roll(one, 1, 0) * 0.9 for name, one in weights.items()}
    safetensors.torch.save_file(turned, target / "model.safetensors", {"format": "pt"})
    return target


@pytest.fixture(scope="module", params=["qwen3", "tied llama", "experts"])
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("models")
    save: Callable[..., Path] = {
        "qwen3": save_qwen3,
        "tied llama": lambda path: save_llama(path, tie_word_embeddings=True),
        "experts": save_qwen3_moe,
    }[request.param]
    a = save(folder / "a")
    return Pair(a, other_weights(a, folder / "b"))


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    folder = tmp_path_factory.mktemp("dense")
    a = save_qwen3(folder / "a")
    return Pair(a, other_weights(a, folder / "b"))


@pytest.fixture
def make_llm(dense: Pair) -> Iterator[Callable[..., LLM]]:
    with llms_of(dense.a, page_size=4, dtype="bfloat16") as make:
        yield make


def numbers(llm: LLM) -> Numbers:
    """Log probabilities of a prompt and of what is generated after it."""
    (result,) = ask(llm, [TEXT], 0, max_new_tokens=6)
    assert result.prompt is not None
    return result.token_ids, result.prompt.logprobs.tokens + result.logprobs.top


def order(llm: LLM, what: WeightOrder, **how: Any) -> str:
    done: CallDone = llm.run(order_weights(llm.services, what, **how))
    if not done.done:
        raise InvalidRequest(done.message)
    return done.message


def send(llm: LLM, tensors: Mapping[str, Tensor], form: str = "safetensors") -> str:
    data = safetensors.torch.save(dict(tensors))
    if form == "pickle":
        data = pickle.dumps(list(tensors.items()))
    return order(llm, UpdateFromTensors(parts=[data], form=form))


def in_parts(tensors: Mapping[str, Tensor], seed: int) -> list[dict[str, Tensor]]:
    names = list(tensors)
    random.Random(seed).shuffle(names)
    return [{name: tensors[name] for name in names[at::3]} for at in range(3)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_updated_engine_is_one_that_started_so(pair: Pair, dtype: str) -> None:
    """From disk, from tensors in parts and any order; back again it is as before, bit by bit."""
    with llms_of(pair.a, page_size=4, dtype=dtype) as make:
        expected = numbers(make(pair.b))
        llm = make()
        first = numbers(llm)
        order(llm, UpdateFromDisk(path=str(pair.b)))
        assert numbers(llm) == expected
        order(llm, UpdateFromDisk(path=str(pair.a)))
        assert numbers(llm) == first
        for form, seed in (("safetensors", 1), ("pickle", 2)):
            for part in in_parts(pair.tensors(pair.b), seed):
                send(llm, part, form)
            assert numbers(llm) == expected
            for part in in_parts(pair.tensors(pair.a), seed):
                send(llm, part)
            assert numbers(llm) == first
        assert first != expected


def test_part_of_a_fused_layer_can_be_exchanged(make_llm: Callable[..., LLM], dense: Pair) -> None:
    """As a fresh start with a checkpoint of both."""
    a, b = dense.tensors(dense.a), dense.tensors(dense.b)
    name = "model.layers.1.self_attn.k_proj.weight"
    mixed = dense.a.parent / "mixed"
    if not mixed.exists():
        other_weights(dense.a, mixed)
        safetensors.torch.save_file(a | {name: b[name]}, mixed / "model.safetensors")
    llm = make_llm()
    send(llm, {name: b[name]})
    assert numbers(llm) == numbers(make_llm(mixed))
    rows = order(llm, ReadWeight(name=name, most=3))
    assert torch.equal(torch.tensor(eval(rows)), b[name][:3].bfloat16().float())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"model.nothing.weight": torch.zeros(3)}, "1 unexpected: model.nothing"),
        (lambda t: t | {"model.norm.weight": torch.zeros(3)}, "of the wrong shape: model.norm"),
        (
            lambda t: t | {"model.norm.weight": t["model.norm.weight"].int()},
            "not of floating point: model.norm",
        ),
    ],
)
def test_a_failed_update_changes_nothing(
    make_llm: Callable[..., LLM],
    dense: Pair,
    tmp_path: Path,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    llm = make_llm()
    before = numbers(llm)
    wrong = change(dense.tensors(dense.b))
    with pytest.raises(InvalidRequest, match=message):
        send(llm, wrong)
    bad = other_weights(dense.a, tmp_path / "bad")
    safetensors.torch.save_file(wrong, bad / "model.safetensors")
    if "floating" not in message:
        with pytest.raises(InvalidRequest, match=message):
            order(llm, UpdateFromDisk(path=str(bad)), weight_version="2")
    lacking = dict(list(dense.tensors(dense.b).items())[1:])
    safetensors.torch.save_file(lacking, bad / "model.safetensors")
    with pytest.raises(InvalidRequest, match="1 missing"):
        order(llm, UpdateFromDisk(path=str(bad)))
    (bad / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(InvalidRequest):
        order(llm, UpdateFromDisk(path=str(bad)))
    with pytest.raises(InvalidRequest):
        order(llm, UpdateFromDisk(path=str(tmp_path / "nowhere")))
    assert numbers(llm) == before
    assert llm.services.served.version == "default"


def test_a_checkpoint_of_other_sizes_is_refused(
    make_llm: Callable[..., LLM], tmp_path: Path
) -> None:
    other = save_qwen3(tmp_path / "other", num_hidden_layers=2)
    with pytest.raises(InvalidRequest, match=r"num_layers.*start a server"):
        order(make_llm(), UpdateFromDisk(path=str(other)))


@pytest.mark.parametrize("scheme", ["w8a8_int8", "fp8"])
def test_quantised_layers_are_quantised_anew_or_refused(dense: Pair, scheme: str) -> None:
    """In whole; a part of a fused layer is refused by name, before anything changes."""
    with llms_of(dense.a, page_size=4, dtype="bfloat16", quantization=scheme) as make:
        expected, llm = numbers(make(dense.b)), make()
        before = numbers(llm)
        b = dense.tensors(dense.b)
        with pytest.raises(InvalidRequest, match=r"missing beside.*layers\.0\.self_attn\.v_proj"):
            send(llm, {name: b[name] for name in b if ".v_proj" not in name})
        assert numbers(llm) == before
        send(llm, b)
        assert numbers(llm) == expected
        order(llm, UpdateFromDisk(path=str(dense.a)))
        assert numbers(llm) == before


def test_nothing_of_the_old_weights_is_taken_from_the_cache(
    make_llm: Callable[..., LLM], dense: Pair
) -> None:
    llm = make_llm()
    numbers(llm)
    send(llm, dense.tensors(dense.b))
    (result,) = llm.generate([TEXT], {"max_new_tokens": 1})
    assert result.num_cached_tokens == 0
    (result,) = llm.generate([TEXT], {"max_new_tokens": 1})
    assert result.num_cached_tokens > 0


@pytest.mark.parametrize("mode", ["abort", "retract", "in_place"])
def test_a_paused_engine_computes_nothing(
    make_llm: Callable[..., LLM], dense: Pair, mode: str
) -> None:
    """Requests end, or go on with the same tokens as if nothing had been."""
    llm = make_llm(max_total_tokens=2048)
    sampling = {"max_new_tokens": 150, "ignore_eos": True, "temperature": 0.0}
    (expected,) = llm.generate([TEXT], sampling)
    llm.flush_cache()
    results: list[Any] = []
    asking = threading.Thread(target=lambda: results.extend(llm.generate([TEXT], sampling)))
    before = llm.stats().num_output_tokens
    asking.start()
    while llm.stats().num_output_tokens < before + 10:
        time.sleep(0.001)
    llm.run(pause(llm.services, mode))
    steps = llm.stats().num_steps
    late: list[Any] = []
    waiting = threading.Thread(target=lambda: late.extend(llm.generate([TEXT], sampling)))
    waiting.start()
    time.sleep(0.05)
    status = llm.stats()
    assert status.num_steps == steps
    assert status.num_running == (1 if mode == "in_place" else 0)
    if mode == "in_place":
        with pytest.raises(InvalidRequest, match="flush_cache false"):
            send(llm, dense.tensors(dense.a))
        data = safetensors.torch.save(dense.tensors(dense.a))
        order(llm, UpdateFromTensors(parts=[data], form="safetensors"), flush_cache=False)
    else:
        send(llm, dense.tensors(dense.a))
    llm.run(go_on(llm.services))
    asking.join(60)
    waiting.join(60)
    assert late[0].token_ids == expected.token_ids
    if mode == "abort":
        assert results[0].finish.kind == "abort"
    else:
        assert results[0].token_ids == expected.token_ids


def test_an_update_waits_for_running_requests(make_llm: Callable[..., LLM], dense: Pair) -> None:
    """And those that come meanwhile wait for it."""
    llm = make_llm()
    sampling = {"max_new_tokens": 100, "ignore_eos": True, "temperature": 0.0}
    (of_a,) = llm.generate([TEXT], sampling)
    llm.flush_cache()
    results: list[Any] = []
    asking = threading.Thread(target=lambda: results.extend(llm.generate([TEXT], sampling)))
    before = llm.stats().num_output_tokens
    asking.start()
    while llm.stats().num_output_tokens < before + 5:
        time.sleep(0.001)
    send(llm, dense.tensors(dense.b))
    (of_b,) = llm.generate([TEXT], sampling)
    asking.join(60)
    assert results[0].token_ids == of_a.token_ids
    assert of_b.token_ids != of_a.token_ids
    assert of_b.token_ids == make_llm(dense.b).generate([TEXT], sampling)[0].token_ids


def test_weights_change_between_two_steps_of_a_request(
    make_llm: Callable[..., LLM], dense: Pair
) -> None:
    """Which goes on with the KV that it has, if the caller wants that."""
    llm = make_llm(max_total_tokens=2048)
    sampling = {"max_new_tokens": 1500, "ignore_eos": True, "temperature": 0.0}
    results: list[Any] = []
    asking = threading.Thread(target=lambda: results.extend(llm.generate([TEXT], sampling)))
    before = llm.stats().num_output_tokens
    asking.start()
    while llm.stats().num_output_tokens < before + 5:
        time.sleep(0.001)
    update = UpdateFromDisk(path=str(dense.b))
    with pytest.raises(InvalidRequest, match="flush_cache false"):
        order(llm, update, between_steps=True)
    order(llm, update, between_steps=True, flush_cache=False)
    assert llm.stats().num_running == 1
    assert not results
    llm.run(pause(llm.services, "abort"))
    llm.run(go_on(llm.services))
    asking.join(60)
    llm.flush_cache()
    assert numbers(llm) == numbers(make_llm(dense.b))


def test_the_weights_of_before_are_read_again_if_a_file_ends_early(
    make_llm: Callable[..., LLM], dense: Pair, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update that fails while it is prepared, after its checks, leaves nothing behind: a part
    that comes later does not bring the failed one's along."""
    from sapwood.app.building import weights

    llm = make_llm()
    before = numbers(llm)
    whole = weights.stored_weights

    def broken(*args: Any, **how: Any) -> Iterator[tuple[str, Any]]:
        for count, one in enumerate(whole(*args, **how)):
            if count == 20:
                raise OSError("the disk is gone")
            yield one

    with monkeypatch.context() as patched:
        patched.setattr(weights, "stored_weights", broken)
        with pytest.raises(InvalidRequest, match="the disk is gone"):
            order(llm, UpdateFromDisk(path=str(dense.b)))
    assert numbers(llm) == before
    name = "model.layers.0.self_attn.q_proj.weight"
    send(llm, {name: dense.tensors(dense.a)[name]})
    assert numbers(llm) == before


def broadcast(path: str, port: int, flattened: bool, size: int = 2) -> None:
    """A trainer: makes the group with torch's own functions and sends a checkpoint's tensors."""
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, size, True)
    helper = dist.distributed_c10d._new_process_group_helper
    from datetime import timedelta

    group, _ = helper(
        size, 0, [], dist.Backend("gloo"), dist.PrefixStore("trainers", store),
        group_name="trainers", timeout=timedelta(seconds=60),
    )  # fmt: skip
    dist.distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(size)}
    tensors = list(load_file(path).values())
    if flattened:
        tensors = [torch.cat([tensor.flatten().view(torch.uint8) for tensor in tensors])]
    for tensor in tensors:
        dist.broadcast(tensor, src=0, group=group)
    # At an ordinary exit the group's threads may outlive it, and end the process with SIGABRT.
    os._exit(0)


@pytest.mark.parametrize("flattened", [False, True])
def test_weights_come_from_a_process_group(
    make_llm: Callable[..., LLM], dense: Pair, flattened: bool
) -> None:
    llm = make_llm()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    b = dense.tensors(dense.b)
    trainer = multiprocessing.get_context("spawn").Process(
        target=broadcast, args=(str(dense.b / "model.safetensors"), port, flattened)
    )
    trainer.start()
    join = JoinUpdateGroup(
        group_name="trainers", master_address="127.0.0.1", master_port=port, rank=1,
        world_size=2, backend="gloo",
    )  # fmt: skip
    order(llm, join)
    with pytest.raises(InvalidRequest, match="exists"):
        order(llm, join)
    wrong = UpdateFromGroup(group_name="trainers", names=["x"], dtypes=["float32"], shapes=[[3]])
    with pytest.raises(InvalidRequest, match="unexpected: x"):
        order(llm, wrong)
    told = order(
        llm,
        UpdateFromGroup(
            group_name="trainers",
            names=list(b),
            dtypes=["float32"] * len(b),
            shapes=[list(one.shape) for one in b.values()],
            is_flattened=flattened,
        ),
    )
    trainer.join(60)
    assert trainer.exitcode == 0
    assert f"{len(b)} tensors" in told
    assert numbers(llm) == numbers(make_llm(dense.b))
    order(llm, LeaveUpdateGroup(group_name="trainers"))
    with pytest.raises(InvalidRequest, match="no group 'trainers'"):
        order(llm, LeaveUpdateGroup(group_name="trainers"))


def test_the_checker_tells_whether_weights_are_those_of_before(
    make_llm: Callable[..., LLM], dense: Pair
) -> None:
    llm = make_llm()
    with pytest.raises(InvalidRequest, match="no snapshot"):
        order(llm, CheckWeights(action="compare"))
    before = numbers(llm)
    order(llm, CheckWeights(action="snapshot"))
    order(llm, CheckWeights(action="compare"))
    order(llm, CheckWeights(action="reset_tensors"))
    with pytest.raises(InvalidRequest, match="tensors differ from the snapshot"):
        order(llm, CheckWeights(action="compare"))
    assert numbers(llm) != before
    send(llm, dense.tensors(dense.a))
    order(llm, CheckWeights(action="compare"))
    assert numbers(llm) == before
    with pytest.raises(InvalidRequest, match="must be snapshot"):
        order(llm, CheckWeights(action="burn"))


@pytest.mark.parametrize("backup", [True, False])
def test_released_memory_comes_back(tmp_path: Path, dense: Pair, backup: bool) -> None:
    """Resident memory falls by 90% of weights and pool, and outputs are the same after it."""
    model = save_llama(
        tmp_path / "large", hidden_size=512, intermediate_size=2048, num_hidden_layers=4
    )
    options = {"enable_memory_saver": True, "enable_weights_cpu_backup": backup}
    with llms_of(model, page_size=4, dtype="bfloat16", max_total_tokens=65536) as make:
        llm = make(**options)
        prompts = [[(n * 37 + seed) % 250 for n in range(200)] for seed in range(128)]
        llm.generate(prompts, {"max_new_tokens": 1})
        before = numbers(llm)
        process = psutil.Process()
        weights = sum(one.numel() * 2 for one in load_file(model / "model.safetensors").values())
        pool = llm.stats().num_pages - llm.stats().num_free_pages
        pool_bytes = pool * 4 * 4 * 2 * 2 * 32 * 2  # tokens, layers, k and v, heads, entries, bf16
        resident = process.memory_info().rss
        order(llm, ReleaseMemory(tags=[]))
        fallen = resident - process.memory_info().rss
        assert fallen >= 0.9 * (weights + pool_bytes)
        with pytest.raises(InvalidRequest, match="released already"):
            order(llm, ReleaseMemory(tags=["weights"]))
        late: list[Any] = []
        asking = threading.Thread(target=lambda: late.append(numbers(llm)))
        asking.start()
        time.sleep(0.05)
        assert not late
        order(llm, ResumeMemory(tags=["kv_cache"]))
        assert not late
        order(llm, ResumeMemory(tags=["weights", "cuda_graph"]))
        asking.join(60)
        assert late == [before]
        with pytest.raises(InvalidRequest, match="is not released"):
            order(llm, ResumeMemory(tags=["weights"]))


def test_memory_is_only_released_if_the_operator_wants_it(make_llm: Callable[..., LLM]) -> None:
    with pytest.raises(InvalidRequest, match="--enable-memory-saver"):
        order(make_llm(), ReleaseMemory(tags=["kv_cache"]))


def test_a_hundred_updates_leave_memory_flat(make_llm: Callable[..., LLM], dense: Pair) -> None:
    llm, process = make_llm(), psutil.Process()
    for _ in range(20):
        send(llm, dense.tensors(dense.b))
    before = process.memory_info().rss
    for _ in range(80):
        send(llm, dense.tensors(dense.b))
    assert process.memory_info().rss - before < 8e6


def test_adapters_and_drafts_go_on_with_new_weights(
    make_llm: Callable[..., LLM], dense: Pair
) -> None:
    sampling = {"max_new_tokens": 40, "temperature": 0.0}
    expected = make_llm(dense.b).generate([TEXT], sampling)[0].token_ids
    for drafts in (
        {"speculative_algorithm": "NGRAM"},
        {
            "speculative_algorithm": "STANDALONE",
            "speculative_draft_model_path": str(dense.a),
            "speculative_num_draft_tokens": 4,
        },
    ):
        llm = make_llm(**drafts)
        llm.generate([TEXT], sampling)
        send(llm, dense.tensors(dense.b))
        assert llm.generate([TEXT], sampling)[0].token_ids == expected


def test_adapters_stay_on_new_weights(tmp_path: Path) -> None:
    """As in an engine that started with them, beside requests of the base model."""
    write_adapter(tmp_path / "adapter", 4)
    a = save_llama(tmp_path / "a", hidden_size=64, num_attention_heads=2)
    b = other_weights(a, tmp_path / "b")
    with llms_of(a, page_size=4, lora_paths=f"mine={tmp_path / 'adapter'}") as make:

        def tokens(llm: LLM) -> list[list[int]]:
            """Of the adapter and of the base model."""
            results = llm.generate([TEXT, TEXT], GREEDY, lora_path=["mine", None])
            return [result.token_ids for result in results]

        expected, llm = tokens(make(b)), make()
        before = tokens(llm)
        send(llm, load_file(b / "model.safetensors"))
        assert tokens(llm) == expected
        order(llm, UpdateFromDisk(path=str(a)))
        assert tokens(llm) == before
        assert len({str(one) for one in expected + before}) == 4


def test_hidden_states_are_those_of_the_new_weights(dense: Pair) -> None:
    """Also of a prompt that the engine computed with the old ones."""
    with llms_of(dense.a, page_size=4, enable_return_hidden_states=True) as make:
        asked = {"input_ids": TEXT, "return_hidden_states": True}

        def told(llm: LLM) -> list[Any]:
            states: list[Any] = generate(llm, asked)["meta_info"]["hidden_states"]
            return states

        expected, llm = told(make(dense.b)), make()
        before = told(llm)
        send(llm, dense.tensors(dense.b))
        assert told(llm) == expected
        order(llm, UpdateFromDisk(path=str(dense.a)))
        assert told(llm) == before
        assert before != expected
