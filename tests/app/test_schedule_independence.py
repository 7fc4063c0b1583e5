"""A real model says the same whatever else the engine does: chunks, pages, retractions, aborts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from sapwood.app.building.loaded_models import load_model
from sapwood.app.building.resolving import Resolved, resolve_config
from sapwood.app.building.wiring import Engine, build_engine
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.kernels.cpu import CpuKernels
from sapwood.kernels.kv_cache import KV_CACHE_DTYPES
from sapwood.kernels.registry import Need
from sapwood.models.lm.decoder import Decoder
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.config.scheduler import POLICIES
from sapwood.schema.output import EngineOutput, EngineStatus, Finish, StepOutputs
from sapwood.schema.request import Abort, EngineInput, Generate, GetStatus, RequestOptions
from sapwood.schema.sampling import SamplingParams
from tests.models.lm.cases import WINDOWS_AND_ALL, longrope
from tests.models.lm.harness import Session
from tests.tiers import examples, sweep
from tests.tiny import write_llama

NUM_OUTPUTS = 24
LEAST_GAP = 1e-4
"""Two largest logits closer than this may change places by rounding: neither order is wrong."""

CLEAR_GAP = 1e-3
"""The same where a last bit may decide to which number a key is rounded."""

CROWDED = {"page_size": 4, "max_total_tokens": 160, "schedule_conservativeness": 0.0}
"""So few pages that requests are retracted."""


GUESSING = {"speculative_algorithm": "NGRAM", "disable_speculative_adaptation": True}
"""So many guesses that some are right, though the prompts are random."""


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def prompts() -> list[list[int]]:
    """Three families that share beginnings, so that there are prefixes to hit."""
    generator = torch.Generator().manual_seed(3)

    def text(length: int) -> list[int]:
        return torch.randint(0, 256, (length,), generator=generator).tolist()

    stems = [text(length) for length in (0, 17, 40)]
    return [stem + text(length) for stem in stems for length in (1, 2, 5, 9, 16, 23)]


@torch.inference_mode()
def greedy_alone(
    session: Session, name: str, prompt: Sequence[int], *, least_gap: float = LEAST_GAP
) -> list[int] | None:
    """The output for one prompt with nothing else around; None if it hangs on a rounding error."""
    output: list[int] = []
    new = list(prompt)
    if session.switch_length is not None and len(prompt) <= session.switch_length:
        session.short.add(name)
    while len(output) < NUM_OUTPUTS:
        logits = session.step({name: new})[name][-1]
        (largest, second), _ = logits.topk(2)
        if largest - second < least_gap:
            return None
        new = [int(logits.argmax())]
        output += new
        if name in session.short and len(prompt) + len(output) > session.switch_length:
            name, new = f"{name}, long", [*prompt, *output]  # all keys anew
    return output


def resolved(directory: Path, **options: Any) -> Resolved:
    values = {
        "model": str(directory),
        "load_format": "dummy",
        "dtype": "float32",
        "num_threads": 1,
        "skip_server_warmup": True,
        **options,
    }
    return resolve_config(EngineConfig.of(values), home=directory)


@cache
def expected(
    directory: Path, texts: Callable[[], list[list[int]]] = prompts
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) from a bare decoder over the reference kernels."""
    bare = resolved(directory, kernels="reference", page_size=8)
    model = load_model(bare)
    assert isinstance(model, Decoder)
    found = []
    for index, prompt in enumerate(texts()):
        session = Session(model, page_size=8, num_pages=16)
        output = greedy_alone(session, str(index), prompt)
        if output is not None:
            found.append((prompt, output))
    return found


def test_the_expected_outputs_say_something(tiny_llama: Path) -> None:
    outputs = [tuple(output) for _, output in expected(tiny_llama)]
    assert len(outputs) >= 14
    assert len(set(outputs)) == len(outputs)
    assert all(len(set(output)) > 3 for output in outputs)


@dataclass(frozen=True)
class Asked:
    """One request: which prompt, how much, and at which turns it comes and is aborted."""

    prompt: list[int]
    output: list[int]
    arrives: int
    aborted: int | None


class World:
    """A whole engine over the tiny model, turned by hand."""

    def __init__(self, directory: Path, options: dict[str, Any]) -> None:
        self.channel: QueueChannel[EngineInput] = QueueChannel()
        self.tokens: dict[str, list[int]] = {}
        self.finishes: dict[str, Finish] = {}
        self.status: EngineStatus | None = None
        sender: CallbackSender[EngineOutput] = CallbackSender(self._take)
        self.engine: Engine = build_engine(resolved(directory, **options), self.channel, sender)

    def _take(self, message: EngineOutput) -> None:
        if isinstance(message, EngineStatus):
            self.status = message
            return
        assert isinstance(message, StepOutputs)
        for output in message.outputs:
            assert output.request_id not in self.finishes, "an output after the terminal one"
            self.tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                self.finishes[output.request_id] = output.finish

    def run(self, requests: Sequence[Asked]) -> EngineStatus:
        turn = 0
        while len(self.finishes) < len(requests):
            for index, asked in enumerate(requests):
                if asked.arrives == turn:
                    self.channel.send(_generate(index, asked))
                if asked.aborted == turn:
                    self.channel.send(Abort(f"r{index}"))
            self.engine.loop.turn(0.0)
            turn += 1
            assert turn < 4000, "a request never ended"
        self.channel.send(GetStatus(""))
        for _ in range(4):  # what is in flight comes to its end
            self.engine.loop.turn(0.0)
        assert self.status is not None
        return self.status

    def close(self) -> None:
        self.engine.executor.close()


def _generate(index: int, asked: Asked) -> Generate:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=len(asked.output), ignore_eos=True)
    return Generate(
        request_id=f"r{index}", prompt_ids=asked.prompt, options=RequestOptions(sampling=sampling)
    )


def check(directory: Path, requests: Sequence[Asked], options: dict[str, Any]) -> EngineStatus:
    world = World(directory, options)
    try:
        status = world.run(requests)
    finally:
        world.close()
    for index, asked in enumerate(requests):
        tokens, finish = world.tokens[f"r{index}"], world.finishes[f"r{index}"]
        if finish.kind == "abort":
            assert asked.aborted is not None
            assert tokens == asked.output[: len(tokens)]
        else:
            assert (tokens, finish.kind) == (asked.output, "length")
    assert status.num_leased_pages == 0
    assert status.num_running == status.num_waiting == 0
    return status


def kernels_here() -> list[str]:
    need = Need(device="cpu", dtype=torch.float32, head_dim=32, page_size=8)
    return ["torch"] if CpuKernels.why_not(need) else ["cpu", "torch"]


@dataclass(frozen=True)
class Draft:
    """A request before it is known which prompts there are."""

    which: int
    length: int
    arrives: int
    aborted: int | None

    def of(self, pool: Sequence[tuple[list[int], list[int]]]) -> Asked:
        prompt, output = pool[self.which % len(pool)]
        return Asked(prompt, output[: self.length], self.arrives, self.aborted)


DRAFTS = st.builds(
    Draft,
    which=st.integers(0, 17),
    length=st.integers(1, NUM_OUTPUTS),
    arrives=st.integers(0, 12),
    aborted=st.none() | st.none() | st.integers(0, 40),
)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[list[Draft], dict[str, Any]]:
    drafts = draw(st.lists(DRAFTS, min_size=1, max_size=10))
    page_size = draw(st.sampled_from([1, 4, 8, 16, 32]))
    # The largest request has 63 prompt tokens and 24 output tokens.
    num_tokens = draw(st.integers(96, 300))
    options = {
        "kernels": draw(st.sampled_from(kernels_here())),
        "page_size": page_size,
        "max_total_tokens": num_tokens - num_tokens % page_size,
        "chunked_prefill_size": draw(st.sampled_from([1, 3, 7, 32, -1])),
        "max_running_requests": draw(st.integers(1, 6)),
        "schedule_policy": draw(st.sampled_from(POLICIES)),
        "schedule_conservativeness": draw(st.sampled_from([0.0, 1.0])),
        "in_batch_prefix_threshold": draw(st.sampled_from([-1, 8])),
        "disable_radix_cache": draw(st.booleans()),
        "overlap_depth": draw(st.sampled_from([1, 2])),
        **draw(st.sampled_from([{}, GUESSING])),
    }
    return drafts, options


@settings(max_examples=examples(150), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(worlds())
def test_outputs_do_not_depend_on_the_schedule(
    tiny_llama: Path, world: tuple[list[Draft], dict[str, Any]]
) -> None:
    drafts, options = world
    pool = expected(tiny_llama)
    check(tiny_llama, [draft.of(pool) for draft in drafts], options)


@cache
def expected_in_8_bits(
    directory: Path, kernels: str, kind: str
) -> list[tuple[list[int], list[int]]]:
    """(prompt, output) of the prompts alone, whole, over those kernels. A number on the border
    between two may be rounded to either, so that only clear outputs count."""
    bare = resolved(directory, kernels=kernels, page_size=8, kv_cache_dtype=kind)
    model = load_model(bare)
    assert isinstance(model, Decoder)
    found = []
    for index, prompt in enumerate(prompts()):
        session = Session(model, page_size=8, num_pages=16, dtype=KV_CACHE_DTYPES[kind])
        output = greedy_alone(session, str(index), prompt, least_gap=CLEAR_GAP)
        if output is not None:
            found.append((prompt, output))
    return found


@sweep(strength=1, kind=["int8", "fp8_e4m3", "fp8_e5m2"], kernels=["cpu", "torch"])
def test_it_holds_for_a_kv_cache_in_8_bits(tiny_llama: Path, kernels: str, kind: str) -> None:
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    found = expected_in_8_bits(tiny_llama, kernels, kind)
    assert len(found) >= 8
    requests = [
        Asked(prompt, output, arrives=index, aborted=20 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate(found)
    ]
    options = {"kernels": kernels, "kv_cache_dtype": kind, **CROWDED}
    for depth, chunk in ((1, 16), (2, 7)):
        status = check(
            tiny_llama, requests, {**options, "overlap_depth": depth, "chunked_prefill_size": chunk}
        )
        assert status.num_retractions > 0
        assert status.num_cached_tokens > 0


@pytest.mark.parametrize("depth", [1, 2])
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_it_holds_where_requests_are_retracted_and_prefixes_hit(
    tiny_llama: Path, kernels: str, depth: int
) -> None:
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    requests = [
        Asked(prompt, output, arrives=index, aborted=20 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate(expected(tiny_llama))
    ]
    options = {"kernels": kernels, "overlap_depth": depth, "chunked_prefill_size": 16, **CROWDED}
    status = check(tiny_llama, requests, options)
    assert status.num_retractions > 0
    assert status.num_cached_tokens > 0
    assert status.num_aborted > 0


LFM2: dict[str, Any] = {
    "architectures": ["Lfm2ForCausalLM"],
    "model_type": "lfm2",
    "num_hidden_layers": 4,
    "layer_types": ["conv", "full_attention", "conv", "conv"],
    "block_auto_adjust_ff_dim": False,
}
SPARSE: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "num_hidden_layers": 3,
    "first_k_dense_replace": 2,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    **dict.fromkeys(("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "v_head_dim"), 32),
    "qk_nope_head_dim": 32,
    "index_n_heads": 10,
    "index_head_dim": 32,
    "index_topk": 12,
    "indexer_types": ["full", "shared", "full"],
}
OTHER_MODELS: dict[str, dict[str, Any]] = {
    "latent rows, of which some are chosen": SPARSE,
    "windows beside full layers": {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "num_hidden_layers": 3,
        "sliding_window": 12,
        "query_pre_attn_scalar": 32,
        "attn_logit_softcapping": 5.0,
    },
    "states": LFM2,
    "keys and values of other layers": {
        "architectures": ["Gemma4ForCausalLM"],
        "model_type": "gemma4_text",
        "num_hidden_layers": 5,
        "layer_types": [*WINDOWS_AND_ALL, "sliding_attention", *WINDOWS_AND_ALL],
        "num_kv_shared_layers": 2,
        "sliding_window": 12,
        "global_head_dim": 64,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 100,
    },
    "layers that differ": {
        "architectures": ["DeciLMForCausalLM"],
        "model_type": "nemotron-nas",
        "num_hidden_layers": 3,
        "block_configs": [
            {"attention": {"no_op": True}, "ffn": {"ffn_mult": 4.0}},
            {"attention": {"n_heads_in_group": 1}, "ffn": {"no_op": True}},
            {"attention": {"n_heads_in_group": 2}, "ffn": {"ffn_mult": 8.0}},
        ],
    },
    "experts": {
        "architectures": ["MixtralForCausalLM"],
        "model_type": "mixtral",
        "num_local_experts": 4,
    },
}


@pytest.fixture(scope="module", params=OTHER_MODELS)
def other_model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("other") / "model", **OTHER_MODELS[request.param])


@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_it_holds_for_other_layers(other_model: Path, kernels: str) -> None:
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    found = expected(other_model)
    assert len({tuple(output) for _, output in found}) >= 10
    requests = [
        Asked(prompt, output, arrives=index, aborted=20 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate(found)
    ]
    for depth, chunk in ((1, 16), (2, 7)):
        options = {"overlap_depth": depth, "chunked_prefill_size": chunk, **CROWDED}
        status = check(other_model, requests, {"kernels": kernels, **options})
        assert status.num_retractions > 0


SWITCH_LENGTH = 32


@pytest.fixture(scope="module")
def longrope_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(
        tmp_path_factory.mktemp("longrope") / "model",
        architectures=["Phi3ForCausalLM"],
        model_type="phi3",
        rope_parameters=longrope(16, SWITCH_LENGTH),
    )


@pytest.mark.parametrize("guesses", [{}, GUESSING])
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_it_holds_for_texts_that_become_long(
    longrope_model: Path, kernels: str, guesses: dict[str, Any]
) -> None:
    """Short ones, long ones, and those whose keys are rotated anew while they grow."""
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    found = expected(longrope_model)
    kinds = {
        (len(prompt) > SWITCH_LENGTH, len(prompt) + NUM_OUTPUTS > SWITCH_LENGTH)
        for prompt, _ in found
    }
    assert kinds == {(False, False), (False, True), (True, True)}
    requests = [
        Asked(prompt, output, arrives=index, aborted=20 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate(found)
    ]
    for depth, chunk in ((1, 16), (2, 7)):
        options = {"overlap_depth": depth, "chunked_prefill_size": chunk, **CROWDED, **guesses}
        status = check(longrope_model, requests, {"kernels": kernels, **options})
        assert status.num_cached_tokens > 0


@pytest.fixture(scope="module")
def tiny_lfm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_llama(tmp_path_factory.mktemp("lfm2") / "model", **LFM2)


@st.composite
def worlds_of_states(draw: st.DrawFn) -> tuple[list[Draft], dict[str, Any]]:
    """With any number of states from one on, for running requests and prefixes together."""
    drafts, options = draw(worlds())
    options["kernels"] = kernels_here()[0]  # the fastest: an example is a whole engine
    options["mamba_track_interval"] = options["page_size"] * draw(st.integers(1, 4))
    options["max_mamba_cache_size"] = draw(st.none() | st.integers(1, 8))
    return drafts, options


@settings(max_examples=examples(500), suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(worlds_of_states())
def test_outputs_of_a_model_with_states_do_not_depend_on_the_schedule(
    tiny_lfm2: Path, world: tuple[list[Draft], dict[str, Any]]
) -> None:
    drafts, options = world
    pool = expected(tiny_lfm2)
    check(tiny_lfm2, [draft.of(pool) for draft in drafts], options)


@pytest.mark.parametrize("kind", ["int8", "fp8_e4m3"])
@pytest.mark.parametrize("kernels", ["cpu", "torch"])
def test_states_beside_a_kv_cache_in_8_bits(tiny_lfm2: Path, kernels: str, kind: str) -> None:
    if kernels not in kernels_here():
        pytest.skip("this build has no C++ kernels")
    found = expected_in_8_bits(tiny_lfm2, kernels, kind)
    assert len(found) >= 8
    requests = [
        Asked(prompt, output, arrives=index, aborted=20 if index % 5 == 4 else None)
        for index, (prompt, output) in enumerate(found)
    ]
    options = {"kv_cache_dtype": kind, "mamba_track_interval": 8, **CROWDED}
    for depth, chunk in ((1, 16), (2, 7)):
        more = {"overlap_depth": depth, "chunked_prefill_size": chunk, "kernels": kernels}
        status = check(tiny_lfm2, requests, {**options, **more})
        assert status.num_retractions > 0
        assert status.num_cached_tokens > 0
