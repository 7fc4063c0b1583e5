"""Updates of weights over several ranks: checked on all before any changes, and undone on all."""

from __future__ import annotations

import json
import multiprocessing
import socket
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sapwood.app.ranks.team_weights import RankMemory, TeamWeights, do_task
from sapwood.base.errors import InvalidRequest, WeightError
from sapwood.engine.steering import NO_WEIGHTS
from sapwood.schema.rank import WeightsTask, WeightsTold
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
from tests.app.building.test_weights import broadcast, numbers, order, other_weights, send
from tests.app.llms import llms_of
from tests.tiny import save_llama, save_qwen3_moe


@dataclass
class Memory:
    """A rank's weights, which fail at the parts that `fails` names."""

    name: str
    fails: tuple[str, ...] = ()
    did: list[str] = field(default_factory=list)
    why_not_ready: str | None = None
    has: str = ""

    def _part(self, part: str) -> str:
        self.did.append(part)
        if part in self.fails:
            raise InvalidRequest(f"{self.name} cannot {part}")
        return self.name

    def check(self, order: WeightOrder) -> None:
        self._part("check")

    def carry_out(self, order: WeightOrder) -> str:
        told = self._part("do")
        return self.has if isinstance(order, ReadWeight) else told

    def perform(self, order: WeightOrder) -> str:
        raise AssertionError("ranks carry out parts of orders")

    def undo(self) -> None:
        self._part("undo")

    def prepare(self, order: WeightOrder) -> None:
        raise AssertionError("ranks take orders in turn with steps")

    def drop(self) -> None:
        raise AssertionError("nothing was prepared")

    def join(self, order: JoinUpdateGroup) -> Future[str]:
        future: Future[str] = Future()
        try:
            future.set_result(self._part("join"))
        except InvalidRequest as error:
            future.set_exception(error)
        return future


@dataclass
class Team:
    others: list[Memory | None]
    answers: dict[int, dict[int, WeightsTold]] = field(default_factory=dict)

    def send(self, task: WeightsTask) -> None:
        told = self.answers[task.number] = {}
        for rank, memory in enumerate(self.others, 1):
            do_task(memory, task, lambda said, rank=rank: told.__setitem__(rank, said))

    def told(self, number: int) -> dict[int, WeightsTold]:
        return self.answers.pop(number)


def ranks(*fails: tuple[str, ...]) -> tuple[TeamWeights, list[Memory], Team]:
    memories = [Memory(f"memory {rank}", one) for rank, one in enumerate(fails)]
    team = Team(list(memories[1:]))
    own: RankMemory = memories[0]
    return TeamWeights(own, team), memories, team


UPDATE = UpdateFromDisk(path="/b")


@pytest.mark.parametrize("failing", [0, 1, 2])
def test_an_update_that_one_rank_cannot_take_changes_none(failing: int) -> None:
    weights, memories, team = ranks(*[("check",) if rank == failing else () for rank in range(3)])
    with pytest.raises(InvalidRequest, match=f"memory {failing} cannot check"):
        weights.perform(UPDATE)
    assert all(memory.did == ["check"] for memory in memories)
    assert not team.answers


@pytest.mark.parametrize("failing", [0, 2])
def test_an_update_that_fails_later_is_undone_on_all(failing: int) -> None:
    weights, memories, team = ranks(*[("do",) if rank == failing else () for rank in range(3)])
    with pytest.raises(WeightError, match=rf"memory {failing} cannot do; all ranks have the old"):
        weights.perform(UPDATE)
    assert all(memory.did == ["check", "do", "undo"] for memory in memories)
    assert not team.answers


def test_other_orders_are_carried_out_by_all() -> None:
    weights, memories, team = ranks((), (), ())
    assert weights.perform(ReleaseMemory(tags=[])) == "memory 0"
    assert [memory.did for memory in memories] == [["do"]] * 3
    group = JoinUpdateGroup(
        group_name="g", master_address="h", master_port=1, rank=1, world_size=4, backend="gloo"
    )
    assert weights.join(group).result() == "memory 0"
    memories[2].fails = ("join",)
    with pytest.raises(InvalidRequest, match="rank 2: memory 2 cannot join"):
        weights.join(group).result()
    assert not team.answers


def test_a_weight_is_read_where_it_is() -> None:
    weights, memories, team = ranks(("do",), ("do",), ())
    memories[2].has = "[[1.0, 2.0]]"
    assert weights.perform(ReadWeight(name="x", most=1)) == "[[1.0, 2.0]]"
    weights, _, team = ranks(("do",), ("do",))
    with pytest.raises(InvalidRequest, match="memory 0 cannot do"):
        weights.perform(ReadWeight(name="x", most=1))
    assert not team.answers


@pytest.mark.parametrize(
    ("dim", "whole"), [(0, [[1, 2], [3, 4], [5, 6], [7, 8]]), (1, [[1, 2, 5, 6], [3, 4, 7, 8]])]
)
def test_parts_of_a_weight_are_put_together(dim: int, whole: list[list[int]]) -> None:
    """In the order of their places; two neighbours have the same part."""
    weights, memories, _ = ranks((), (), ())
    for memory, first, rows in (
        (memories[0], 2, [[5, 6], [7, 8]]),
        (memories[1], 0, [[1, 2], [3, 4]]),
        (memories[2], 2, [[5, 6], [7, 8]]),
    ):
        memory.has = json.dumps({"dim": dim, "first": first, "rows": rows})
    assert json.loads(weights.perform(ReadWeight(name="x", most=4))) == whole


def test_a_rank_without_such_weights_says_so() -> None:
    weights, _, team = ranks((), ())
    team.others[0] = None
    with pytest.raises(InvalidRequest, match="cannot be changed while"):
        weights.perform(UPDATE)
    assert "--enable-dp-attention" in NO_WEIGHTS


def test_too_many_bytes_for_a_message_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sapwood.app.ranks.team_weights.MAX_SENT_BYTES", 3)
    weights, memories, _ = ranks((), ())
    with pytest.raises(InvalidRequest, match="send several requests"):
        weights.perform(UpdateFromTensors(parts=[b"ab", b"cd"], form="safetensors"))
    assert memories[1].did == []


# ---- engines of two ranks ------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["tp", "pp", "experts"])
def two(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """(an engine of two ranks, checkpoints A and B, what an engine answers that started with B)"""
    folder = tmp_path_factory.mktemp("models")
    save = save_qwen3_moe if request.param == "experts" else save_llama
    # Two layers, so that each stage has one; one tensor for embedding and head.
    fields = {"tie_word_embeddings": True} if request.param == "tp" else {}
    a = save(folder / "a", num_hidden_layers=2, **fields)
    b = other_weights(a, folder / "b")
    ranks = {"pp": {"pp_size": 2}, "tp": {"tp_size": 2}, "experts": {"tp_size": 2, "ep_size": 2}}
    options: dict[str, Any] = {"page_size": 4, "enable_memory_saver": True}
    with llms_of(a, **options, **ranks[request.param]) as make:
        other = make(b)
        expected = numbers(other)
        other.close()
        yield make(), a, b, expected


def test_ranks_take_updates(two: Any) -> None:
    """From disk and from tensors in parts, as a start with them; and back again."""
    llm, a, b, expected = two
    first = numbers(llm)
    order(llm, CheckWeights(action="snapshot"))
    order(llm, UpdateFromDisk(path=str(b)))
    assert numbers(llm) == expected
    with pytest.raises(InvalidRequest, match="differ from the snapshot"):
        order(llm, CheckWeights(action="compare"))
    of_a, of_b = load_file(a / "model.safetensors"), load_file(b / "model.safetensors")
    names = sorted(of_a)
    send(llm, {name: of_a[name] for name in names[::2]})
    send(llm, {name: of_a[name] for name in names[1::2]})
    assert numbers(llm) == first
    order(llm, CheckWeights(action="compare"))
    # An entry for each rank, as SGLang's trainers send it.
    whole = [(b / "model.safetensors").read_bytes()] * 2
    order(llm, UpdateFromTensors(parts=whole, form="safetensors"))
    assert numbers(llm) == expected
    for name in ("model.norm", "model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.o_proj",
                 "model.embed_tokens"):  # fmt: skip
        rows = json.loads(order(llm, ReadWeight(name=f"{name}.weight", most=150)))
        expected_rows = load_file(b / "model.safetensors")[f"{name}.weight"][:150]
        assert torch.equal(torch.tensor(rows), expected_rows.float())
    order(llm, UpdateFromDisk(path=str(a)))
    assert numbers(llm) == first
    assert of_b.keys() == of_a.keys()


def test_ranks_keep_their_weights_if_an_update_is_wrong(two: Any, tmp_path: Path) -> None:
    llm, a, b, _ = two
    first = numbers(llm)
    wrong = load_file(b / "model.safetensors")
    name = "model.layers.1.input_layernorm.weight"
    with pytest.raises(InvalidRequest, match="of the wrong shape"):
        send(llm, wrong | {name: torch.zeros(3)})
    with pytest.raises(InvalidRequest, match="unexpected"):
        send(llm, {"model.layers.1.nothing": torch.zeros(3)})
    bad = other_weights(a, tmp_path / "bad")
    del wrong[name]
    save_file(wrong, bad / "model.safetensors")
    with pytest.raises(InvalidRequest, match="1 missing"):
        order(llm, UpdateFromDisk(path=str(bad)))
    data = (b / "model.safetensors").read_bytes()
    with pytest.raises(InvalidRequest, match="3 entries, but the model has 2 ranks"):
        order(llm, UpdateFromTensors(parts=[data] * 3, form="safetensors"))
    assert numbers(llm) == first


def test_ranks_give_memory_back(two: Any) -> None:
    llm = two[0]
    first = numbers(llm)
    order(llm, ReleaseMemory(tags=[]))
    order(llm, ResumeMemory(tags=[]))
    assert numbers(llm) == first


def test_every_rank_joins_a_trainers_group(two: Any) -> None:
    """Rank r of the engine is rank 1 + r of the group; the trainer broadcasts once."""
    llm, a, b, expected = two
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    trainer = multiprocessing.get_context("spawn").Process(
        target=broadcast, args=(str(b / "model.safetensors"), port, False, 3)
    )
    trainer.start()
    order(
        llm,
        JoinUpdateGroup(
            group_name="trainers", master_address="127.0.0.1", master_port=port, rank=1,
            world_size=3, backend="gloo",
        ),
    )  # fmt: skip
    tensors = load_file(b / "model.safetensors")
    order(
        llm,
        UpdateFromGroup(
            group_name="trainers",
            names=list(tensors),
            dtypes=["float32"] * len(tensors),
            shapes=[list(one.shape) for one in tensors.values()],
        ),
    )
    trainer.join(60)
    assert numbers(llm) == expected
    order(llm, LeaveUpdateGroup(group_name="trainers"))
    order(llm, UpdateFromDisk(path=str(a)))
