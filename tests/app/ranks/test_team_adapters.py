"""LoRA adapters over several ranks: loads that end on all of them, and the numbers of one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from safetensors.torch import load_file

from sapwood import LLM
from sapwood.app.ranks import team_adapters
from sapwood.app.ranks.team_adapters import TeamAdapters
from sapwood.base.errors import ConfigError, InvalidRequest, NotFound
from sapwood.engine.adapters import AdapterDesk, AdapterSlots
from sapwood.schema.rank import Loaded, RankOrder
from sapwood.schema.request import LoadAdapter, SentAdapter, UnloadAdapter
from tests.adapters import OPTIONS, VOCABULARY, save_adapters
from tests.app.building.test_adapters import CONVOLUTIONS, EXPERTS, ask, check, named
from tests.app.llms import llms_of
from tests.app.test_windows import text
from tests.tiny import save_lfm2, save_llama, save_qwen3, save_qwen3_moe

# ---- loads, with ranks that are played by the test -----------------------------------------------


class Own:
    """Rank 0's adapters."""

    def __init__(self) -> None:
        self.ends: list[Loaded] = []
        self.orders: list[LoadAdapter] = []
        self.unloaded: list[str] = []

    def load(self, order: LoadAdapter) -> None:
        self.orders.append(order)

    def finished(self) -> list[Loaded]:
        ends, self.ends = self.ends, []
        return ends

    def arrived(self) -> list[str]:
        return []

    def unload(self, adapter_id: str) -> None:
        self.unloaded.append(adapter_id)


class Others:
    """Two more ranks."""

    num_others = 2

    def __init__(self) -> None:
        self.ends: list[tuple[int, Loaded]] = []
        self.sent: list[RankOrder] = []

    def send(self, order: RankOrder) -> None:
        self.sent.append(order)

    def loaded(self) -> list[tuple[int, Loaded]]:
        ends, self.ends = self.ends, []
        return ends


LONG = pytest.mark.long

Told = list[tuple[str, bool, str]]


@pytest.fixture
def ranks() -> tuple[Own, Others, AdapterDesk]:
    own, others = Own(), Others()
    return own, others, AdapterDesk(AdapterSlots(2, 10), TeamAdapters(own, others))


def ended(number: int, failure: str | None = None) -> Loaded:
    return Loaded(call_id=f"call {number}", adapter_id=f"a{number}", num_bytes=4, failure=failure)


def told_by(desk: AdapterDesk) -> Told:
    told: Told = []
    desk.finished(lambda *message: told.append(message))
    return told


def test_a_load_ends_once_it_has_on_every_rank(ranks: tuple[Own, Others, AdapterDesk]) -> None:
    own, others, desk = ranks
    orders = [LoadAdapter(call_id=f"call {i}", adapter_id=f"a{i}", path="/a") for i in (1, 2)]
    for order in orders:
        desk.load(order)
    assert others.sent == own.orders == orders
    own.ends = [ended(1), ended(2)]
    others.ends = [(2, ended(1)), (1, ended(2))]
    assert told_by(desk) == []
    assert desk.slots.why_refused("a1") is not None
    others.ends = [(2, ended(2)), (1, ended(1))]
    assert told_by(desk) == [("call 2", True, "loaded"), ("call 1", True, "loaded")]
    assert desk.slots.why_refused("a1") is None
    assert desk.unload("a1") is None
    assert own.unloaded == ["a1"]
    assert others.sent[-1] == UnloadAdapter(call_id="", adapter_id="a1")


@pytest.mark.parametrize(
    ("failures", "message"),
    [
        ((None, None, "no such folder"), "rank 2 cannot load the adapter: no such folder"),
        (("too large", None, "no such folder"), "too large"),
    ],
)
def test_a_load_that_fails_on_one_rank_fails(
    ranks: tuple[Own, Others, AdapterDesk], failures: tuple[str | None, ...], message: str
) -> None:
    own, others, desk = ranks
    desk.load(LoadAdapter(call_id="call 1", adapter_id="a1", path="/a"))
    own.ends = [ended(1, failures[0])]
    others.ends = [(rank, ended(1, failures[rank])) for rank in (1, 2)]
    assert told_by(desk) == [("call 1", False, message)]
    assert desk.slots.why_refused("a1") is not None
    assert own.unloaded == ["a1"]
    assert isinstance(others.sent[-1], UnloadAdapter)


def test_what_is_too_large_for_a_message_is_not_sent(
    ranks: tuple[Own, Others, AdapterDesk], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(team_adapters, "MAX_SENT_BYTES", 10)
    own, others, desk = ranks
    sent = SentAdapter(config=b"12345", tensors=b"123456")
    desk.load(LoadAdapter(call_id="call 1", adapter_id="a1", path="sent", sent=sent))
    ((call_id, is_loaded, message),) = told_by(desk)
    assert (call_id, is_loaded) == ("call 1", False)
    assert "11 bytes" in message
    assert own.orders == []
    assert not any(isinstance(order, LoadAdapter) for order in others.sent)


# ---- engines of two ranks ------------------------------------------------------------------------


@pytest.fixture
def make_llm() -> Iterator[Callable[..., LLM]]:
    options = {"page_size": 4, "max_total_tokens": 2048, "max_running_requests": 12}
    with llms_of(Path("none"), **options, tp_size=2, enable_lora=True, max_lora_rank=16) as make:
        yield make


MORE_MODELS: tuple[tuple[Callable[..., Path], dict[str, Any], dict[str, dict[str, Any]]], ...] = (
    (save_llama, {}, OPTIONS),
    (save_qwen3, {"tie_word_embeddings": True}, VOCABULARY),
    (save_qwen3_moe, {}, EXPERTS),
    (save_lfm2, {}, CONVOLUTIONS),
)


@pytest.mark.parametrize(
    ("save", "fields", "options"),
    [
        (save_qwen3, {}, {name: VOCABULARY[name] for name in ("both", "saved both")}),
        *(pytest.param(*more, marks=pytest.mark.long) for more in MORE_MODELS),
    ],
)
def test_every_kind_of_adapter_and_the_base_in_one_batch(
    tmp_path: Path,
    make_llm: Callable[..., LLM],
    save: Callable[..., Path],
    fields: dict[str, Any],
    options: dict[str, dict[str, Any]],
) -> None:
    """Log probabilities of prompts, too, are peft's."""
    model_path = save(tmp_path / "model", **fields)
    paths, reference = save_adapters(model_path, tmp_path / "adapters", options)
    llm = make_llm(model_path, lora_paths=named(paths))
    asked = [(name, text(9 + i, seed=i)) for i, name in enumerate(["", *paths, ""])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked, prompt_start=2), strict=True):
        check(result, adapter, prompt, reference)
        assert result.prompt is not None
        assert result.prompt.logprobs is not None
        told = result.prompt.logprobs.of_tokens()
        expected = reference(adapter, prompt)[range(2, len(prompt) - 1), prompt[3:]]
        assert told == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize(
    ("save", "fields", "options", "stages"),
    [
        (save_qwen3, {}, {name: VOCABULARY[name] for name in ("both", "saved both")}, {}),
        pytest.param(save_qwen3, {"tie_word_embeddings": True}, VOCABULARY, {}, marks=LONG),
        pytest.param(save_qwen3_moe, {}, EXPERTS, {"chunked_prefill_size": 8}, marks=LONG),
        pytest.param(save_llama, {}, OPTIONS, {"tp_size": 2}, marks=LONG),
        pytest.param(
            save_llama,
            {"num_hidden_layers": 4},
            OPTIONS,
            {"pp_size": 3, "pp_layer_partition": "1,2,1", "max_loras_per_batch": 2}
            | {"max_total_tokens": 64},  # requests are retracted
            marks=LONG,
        ),
    ],
)
def test_each_stage_has_the_adapters_of_its_layers(
    tmp_path: Path,
    make_llm: Callable[..., LLM],
    save: Callable[..., Path],
    fields: dict[str, Any],
    options: dict[str, dict[str, Any]],
    stages: dict[str, Any],
) -> None:
    """Also while some are loaded and unloaded, and a request is aborted."""
    model_path = save(tmp_path / "model", **fields)
    paths, reference = save_adapters(model_path, tmp_path / "adapters", options)
    first, *others = paths
    name = first.replace(" ", "-")
    llm = make_llm(
        model_path,
        **{"tp_size": 1, "pp_size": 2, "max_loras_per_batch": 8, **stages},
        lora_paths=named({name: paths[name] for name in others}),
        load_format="auto",
    )
    with pytest.raises(InvalidRequest, match="nowhere"):
        llm.load_lora_adapter("other", tmp_path / "nowhere")
    llm.load_lora_adapter(name, paths[first])
    asked = [(name, text(9 + i, seed=i)) for i, name in enumerate(["", *paths, ""])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked, prompt_start=2), strict=True):
        check(result, adapter, prompt, reference)
        assert result.prompt is not None
        assert result.prompt.logprobs is not None
        told = result.prompt.logprobs.of_tokens()
        expected = reference(adapter, prompt)[range(2, len(prompt) - 1), prompt[3:]]
        assert told == pytest.approx(expected.tolist(), abs=1e-4)
    llm.unload_lora_adapter(name)
    with pytest.raises(NotFound, match="is unloaded"):
        ask(llm, [(first, asked[0][1])])
    stats = llm.stats()
    assert (stats.num_running, stats.num_waiting, stats.num_leased_pages) == (0, 0, 0)


def test_an_adapter_that_no_stage_has_a_layer_for_is_refused(
    tmp_path: Path, make_llm: Callable[..., LLM]
) -> None:
    """Each stage checks what is for its own layers; the last one has the scheduler."""
    model_path = save_llama(tmp_path / "model")
    paths, _ = save_adapters(model_path, tmp_path / "adapters", {"all": OPTIONS["all"]})
    llm = make_llm(model_path, tp_size=1, pp_size=2, load_format="auto")
    config = msgspec.json.decode((paths["all"] / "adapter_config.json").read_bytes())
    tensors = load_file(paths["all"] / "adapter_model.safetensors")
    name = next(one for one in tensors if ".layers.0." in one and one.endswith("lora_A.weight"))
    layer, module = name.removesuffix(".lora_A.weight").rsplit(".", 1)
    for other, why in (
        (name.replace("layers.0.", "layers.7."), "no such linear layer"),
        (f"{layer}.no_{module}.lora_A.weight", "rank 1 cannot load.*no such linear layer"),
    ):
        pair = [name, name.replace("lora_A", "lora_B")]
        renamed = [other, other.replace("lora_A", "lora_B")]
        changed = {key: value for key, value in tensors.items() if key not in pair}
        changed |= {new: tensors[old] for new, old in zip(renamed, pair, strict=True)}
        with pytest.raises(InvalidRequest, match=why):
            llm.load_lora_adapter_from_tensors("changed", changed, config)
    llm.load_lora_adapter_from_tensors("as-it-was", tensors, config)


def test_load_and_unload_while_serving(tmp_path: Path, make_llm: Callable[..., LLM]) -> None:
    """The one head of keys and values is on both ranks."""
    model_path = save_llama(tmp_path / "model", num_key_value_heads=1)
    chosen = {name: OPTIONS[name] for name in ("all", "patterns")}
    paths, reference = save_adapters(model_path, tmp_path / "adapters", chosen)
    llm = make_llm(model_path, max_loras_per_batch=2, overlap_depth=2)
    llm.load_lora_adapter("all", paths["all"])
    config = msgspec.json.decode((paths["patterns"] / "adapter_config.json").read_bytes())
    tensors = load_file(paths["patterns"] / "adapter_model.safetensors")
    llm.load_lora_adapter_from_tensors("patterns", tensors, config)
    asked = [(name, text(9 + i, seed=i)) for i, name in enumerate(["", *paths])]
    for (adapter, prompt), result in zip(asked, ask(llm, asked), strict=True):
        check(result, adapter, prompt, reference)
    with pytest.raises(InvalidRequest, match="nowhere"):
        llm.load_lora_adapter("other", tmp_path / "nowhere")
    llm.unload_lora_adapter("all")
    llm.load_lora_adapter("all", paths["patterns"])
    prompt = text(15, seed=6)
    (result,) = ask(llm, [("all", prompt)])
    check(result, "patterns", prompt, reference)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ep_size": 2}, "experts on different ranks"),
        ({"enable_lora_overlap_loading": True, "max_loaded_loras": 8}, "is for one rank"),
    ],
)
def test_what_ranks_cannot_do_is_refused(
    tmp_path: Path, make_llm: Callable[..., LLM], options: dict[str, Any], message: str
) -> None:
    model_path = save_qwen3_moe(tmp_path / "model")
    with pytest.raises(ConfigError, match=message):
        make_llm(model_path, **options)
