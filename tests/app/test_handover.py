"""One engine reads prompts, another one answers them: outputs are those of a single engine."""

from __future__ import annotations

import random
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from sapwood.app.offline.engine import Engine
from sapwood.base.errors import SapwoodError
from tests.adapters import save_adapters
from tests.app.test_windows import MODELS as WINDOWED
from tests.app.test_windows import save, text
from tests.tiny import save_lfm2, save_llama, save_qwen3_5

OPTIONS = {
    "dtype": "float32",
    "num_threads": 1,
    "page_size": 4,
    "max_total_tokens": 1024,
    "max_running_requests": 4,
    "chunked_prefill_size": 16,
    "skip_server_warmup": True,
    "cpu_products": "exact",
}
MODELS: dict[str, Callable[[Path], Path]] = {
    "pages": save_llama,
    "windows and pages": lambda path: save(path, **WINDOWED["layers take turns"]),
    "windows": lambda path: save(path, **WINDOWED["every layer has a window"]),
    "states and pages": save_lfm2,
    "matrices and pages": save_qwen3_5,
}


@dataclass
class Pair:
    """Two engines, and a third one that reads prompts and answers them itself."""

    prefill: Engine
    decode: Engine
    single: Engine
    port: int
    rooms: Iterator[int] = field(default_factory=lambda: iter(range(1, 10**6)))

    def place(self, **more: Any) -> dict[str, Any]:
        room = next(self.rooms) * 1000
        return {"bootstrap_host": "127.0.0.1", "bootstrap_port": self.port} | (
            {"bootstrap_room": room} | more
        )

    def both(self, prompt: Any, sampling: Any, **fields: Any) -> tuple[Any, Any]:
        """(what the engine that reads says, the answer)"""
        asked = self.place() | fields
        with ThreadPoolExecutor(2) as threads:
            reading = threads.submit(self.prefill.generate, None, sampling, prompt, **asked)
            answer = threads.submit(self.decode.generate, None, sampling, prompt, **asked)
            return reading.result(timeout=60), answer.result(timeout=60)

    def decode_alone(self, prompt: Any, sampling: Any, **fields: Any) -> Any:
        """The answer of the engine that generates; the other one reads, and is aborted if the pages
        are not taken."""
        asked = self.place() | fields
        with ThreadPoolExecutor(1) as threads:
            name = f"reads-{asked['bootstrap_room']}"
            reading = threads.submit(
                self.prefill.generate, None, sampling, prompt, rid=name, **asked
            )
            try:
                return self.decode.generate(None, sampling, prompt, **asked)
            finally:
                self.prefill.abort_request(name)
                reading.exception(timeout=60)

    def check_nothing_leaks(self) -> None:
        for engine in (self.prefill, self.decode):
            until_s = time.monotonic() + 10
            while (status := engine.llm.stats()).handovers.num_under_way or status.num_running:
                assert time.monotonic() < until_s, status
                time.sleep(0.01)
            assert all(pool.num_leased == 0 for pool in status.pools), status.pools
            # The loop waits for messages now, so that nobody changes what is looked at.
            time.sleep(0.05)
            engine.llm._engine._engine.scheduler._ledger.check()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def pair_of(model: Path, **more: Any) -> Iterator[Pair]:
    port = free_port()
    options = OPTIONS | {"model_path": str(model)} | more
    moves = {
        name: options.pop(name) for name in ("disaggregation_transfer_backend",) if name in options
    }
    with ExitStack() as stack:

        def engine(**own: Any) -> Engine:
            opened = Engine(**options, **own)
            stack.callback(opened.shutdown)
            return opened

        yield Pair(
            engine(disaggregation_mode="prefill", disaggregation_bootstrap_port=port, **moves),
            engine(disaggregation_mode="decode", disaggregation_checksums=True, **moves),
            engine(),
            port,
        )


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Of the first of the models."""
    with pair_of(save_llama(tmp_path_factory.mktemp("handover"))) as one:
        yield one


GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


def told(answer: Any) -> Any:
    return answer["output_ids"], answer["meta_info"].get("output_token_logprobs")


@pytest.mark.parametrize("name", list(MODELS))
@pytest.mark.parametrize("backend", ["shared_memory", "tcp"])
def test_every_cache_is_handed_over(tmp_path: Path, name: str, backend: str) -> None:
    with pair_of(MODELS[name](tmp_path), disaggregation_transfer_backend=backend) as pair:
        for length in (3, 4, 5, 16, 41, 63, 90):
            prompt = text(length, length)
            reading, answer = pair.both(prompt, GREEDY, return_logprob=True)
            alone = pair.single.generate(None, GREEDY, prompt, return_logprob=True)
            assert told(answer) == told(alone), length
            assert reading["output_ids"] == []
            cached = answer["meta_info"]["cached_tokens"]
            assert cached == (answer["meta_info"]["prompt_tokens"] - 1) // 4 * 4, length
        pair.check_nothing_leaks()


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "max_new_tokens": 10, "ignore_eos": True}
REQUESTS: list[tuple[dict[str, Any], dict[str, Any]]] = [
    (GREEDY, {}),
    (SAMPLED | {"sampling_seed": 3}, {"return_logprob": True, "top_logprobs_num": 2}),
    (SAMPLED | {"sampling_seed": 5, "n": 3}, {}),
    (GREEDY | {"regex": "[a-f]{8}", "ignore_eos": False}, {}),
    (GREEDY | {"frequency_penalty": 1.5, "repetition_penalty": 1.2}, {"return_logprob": True}),
    (GREEDY | {"stop_token_ids": [7]}, {"extra_key": "mine"}),
    (GREEDY | {"max_new_tokens": 1}, {}),
]


def outputs(answer: Any) -> Any:
    return [told(one) for one in answer] if isinstance(answer, list) else told(answer)


def test_mixed_requests_at_once_are_those_of_one_engine(pair: Pair) -> None:
    rng = random.Random(0)
    shared = text(40, 1)
    jobs = []
    for number in range(28):
        sampling, fields = REQUESTS[number % len(REQUESTS)]
        begins = shared if number % 2 else []
        jobs.append((begins + text(rng.randrange(1, 60), number), sampling, fields))
    expected = [outputs(pair.single.generate(None, of, ids, **more)) for ids, of, more in jobs]
    with ThreadPoolExecutor(8) as threads:
        done = list(threads.map(lambda job: pair.both(*job[:2], **job[2]), jobs))
    assert [outputs(answer) for _, answer in done] == expected
    pair.check_nothing_leaks()


def test_guessed_tokens_and_streams_change_nothing(tmp_path: Path) -> None:
    with pair_of(save_llama(tmp_path), speculative_algorithm="NGRAM") as pair:
        prompt = text(20, 1) * 3
        alone = pair.single.generate(None, GREEDY, prompt)
        asked = pair.place()
        with ThreadPoolExecutor(1) as threads:
            reading = threads.submit(pair.prefill.generate, None, GREEDY, prompt, **asked)
            chunks = list(pair.decode.generate(None, GREEDY, prompt, stream=True, **asked))
            assert reading.result(timeout=30)["meta_info"]["finish_reason"]["type"] == "length"
        assert chunks[-1]["output_ids"] == alone["output_ids"]
        assert len(chunks) > 1
        pair.check_nothing_leaks()


def test_the_prompts_log_probabilities_are_told_where_it_is_read(pair: Pair) -> None:
    fields = {"return_logprob": True, "logprob_start_len": 2}
    prompt = text(33, 77)
    reading, answer = pair.both(prompt, GREEDY, **fields)
    alone = pair.single.generate(None, GREEDY, prompt, **fields)
    name = "input_token_logprobs"
    assert reading["meta_info"][name] == alone["meta_info"][name]
    assert not answer["meta_info"].get(name)
    assert told(answer) == told(alone)


def test_what_was_handed_over_is_not_asked_for_again(pair: Pair) -> None:
    prompt = text(50, 5)
    pair.both(prompt, GREEDY)
    before = pair.decode.llm.stats().tiers.num_restored
    pair.both([*prompt, 1, 2], GREEDY)
    assert pair.decode.llm.stats().tiers.num_restored == before
    assert pair.decode.llm.stats().handovers.num_failed == 0


def test_requests_without_a_room_are_read_and_answered_by_either(pair: Pair) -> None:
    prompt = text(21, 9)
    answers = [
        engine.generate(None, GREEDY, prompt)["output_ids"]
        for engine in (pair.prefill, pair.decode, pair.single)
    ]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        ({"bootstrap_host": "203.0.113.9", "bootstrap_room": 5}, "--disaggregation-prefill-hosts"),
        ({"bootstrap_host": "metadata.internal", "bootstrap_room": 5}, "prefill-hosts"),
        ({"bootstrap_host": "127.0.0.1", "bootstrap_room": -1}, "bootstrap_room"),
        ({"bootstrap_host": "127.0.0.1", "bootstrap_room": 2**63}, "bootstrap_room"),
        ({"bootstrap_host": "127.0.0.1", "bootstrap_port": 0, "bootstrap_room": 1}, "port"),
        ({"bootstrap_host": "127.0.0.1", "bootstrap_port": 70000, "bootstrap_room": 1}, "port"),
        ({"bootstrap_host": "127.0.0.1", "bootstrap_room": [1, 2, 3]}, "bootstrap_room"),
        ({"bootstrap_host": ["127.0.0.1"] * 9, "bootstrap_room": 1}, "bootstrap_host"),
        ({"bootstrap_host": "x" * 256, "bootstrap_room": 1}, "255"),
        ({"bootstrap_host": "a\r\nGET", "bootstrap_room": 1}, "bootstrap_host"),
        ({"bootstrap_host": "127.0.0.1"}, "bootstrap_room"),
        ({"bootstrap_room": 1}, "bootstrap_host"),
    ],
)
def test_bad_places_are_refused_by_name(pair: Pair, fields: dict[str, Any], word: str) -> None:
    with pytest.raises(SapwoodError, match=word):
        pair.decode.generate(None, GREEDY, [1, 2, 3], **fields)


def test_an_engine_without_a_part_refuses_rooms(pair: Pair) -> None:
    with pytest.raises(SapwoodError, match="--disaggregation-mode"):
        pair.single.generate(None, GREEDY, [1, 2, 3], **pair.place())


def test_nobody_there_is_told_within_seconds(pair: Pair) -> None:
    start_s = time.monotonic()
    with pytest.raises(SapwoodError, match="nobody is reached"):
        pair.decode.generate(None, GREEDY, text(30, 3), **pair.place(bootstrap_port=free_port()))
    assert time.monotonic() - start_s < 5
    pair.check_nothing_leaks()


def test_two_requests_with_one_room_are_told_apart(pair: Pair) -> None:
    asked = pair.place()
    failures: list[Exception] = []

    def read() -> None:
        try:
            pair.prefill.generate(None, GREEDY, text(30, 4), rid="reads", **asked)
        except SapwoodError as error:
            failures.append(error)

    reading = threading.Thread(target=read)
    reading.start()
    while pair.prefill.llm.stats().handovers.num_under_way == 0:
        time.sleep(0.01)
    with pytest.raises(SapwoodError, match="another open request"):
        pair.prefill.generate(None, GREEDY, text(31, 4), **asked)
    with pytest.raises(SapwoodError, match="another prompt"):
        pair.decode.generate(None, GREEDY, text(32, 4), **asked)
    pair.prefill.abort_request("reads")
    reading.join(10)
    assert not reading.is_alive()
    pair.check_nothing_leaks()


def test_either_sides_abort_frees_the_other(pair: Pair) -> None:
    for engine, other in ((pair.prefill, pair.decode), (pair.decode, pair.prefill)):
        asked = pair.place()
        failures: list[str] = []

        def ask(engine: Engine, name: str, ids: list[int], asked: Any, failures: Any) -> None:
            try:
                engine.generate(None, GREEDY | {"max_new_tokens": 60}, ids, rid=name, **asked)
            except SapwoodError as error:
                failures.append(str(error))

        one = threading.Thread(target=ask, args=(engine, "mine", text(90, 6), asked, failures))
        one.start()
        while engine.llm.stats().handovers.num_under_way == 0:
            time.sleep(0.005)
        engine.abort_request("mine")
        one.join(10)
        assert not one.is_alive()
        # The other side comes later, and hears that there is no such room, or waits in vain.
        two = threading.Thread(target=ask, args=(other, "theirs", text(90, 6), asked, failures))
        two.start()
        time.sleep(0.2)
        other.abort_request("theirs")
        two.join(10)
        assert not two.is_alive()
        pair.check_nothing_leaks()


def test_pages_of_other_weights_are_not_taken(tmp_path: Path) -> None:
    old, new = save_llama(tmp_path / "old"), tmp_path / "new"
    shutil.copytree(old, new)
    weights = load_file(new / "model.safetensors")
    weights["model.layers.0.self_attn.v_proj.weight"] *= -1.0
    save_file(weights, new / "model.safetensors", {"format": "pt"})
    prompt = text(41, 9)
    with pair_of(old) as pair:
        before = pair.both(prompt, GREEDY)[1]
        pair.prefill.update_weights_from_disk(str(new))
        with pytest.raises(SapwoodError, match="do not have the same weights"):
            pair.decode_alone(prompt, GREEDY)
        for engine in (pair.decode, pair.single):
            engine.update_weights_from_disk(str(new))
        after = pair.both(prompt, GREEDY)[1]
        assert after["output_ids"] == pair.single.generate(None, GREEDY, prompt)["output_ids"]
        assert after["meta_info"]["cached_tokens"] == 40
        assert after["output_ids"] != before["output_ids"]
        pair.check_nothing_leaks()


def test_adapters_are_told_apart_by_what_they_contain(tmp_path: Path) -> None:
    model, prompt = save_llama(tmp_path / "model"), text(41, 10)
    config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    paths, _ = save_adapters(model, tmp_path / "adapters", {"one": config, "two": config})
    with pair_of(model, enable_lora=True, max_lora_rank=4) as pair:
        for engine in (pair.prefill, pair.decode, pair.single):
            engine.load_lora_adapter("x", str(paths["one"]))
        answer = pair.both(prompt, GREEDY, lora_path="x")[1]
        alone = pair.single.generate(None, GREEDY, prompt, lora_path="x")
        assert answer["output_ids"] == alone["output_ids"]
        assert answer["meta_info"]["cached_tokens"] == 40
        pair.decode.unload_lora_adapter("x")
        pair.decode.load_lora_adapter("x", str(paths["two"]))
        with pytest.raises(SapwoodError, match="the same adapter"):
            pair.decode_alone(prompt, GREEDY, lora_path="x")
        pair.check_nothing_leaks()


def test_nothing_moves_without_a_peer(tmp_path: Path) -> None:
    with pair_of(save_llama(tmp_path), disaggregation_transfer_backend="fake") as pair:
        prompt = text(30, 8)
        reading, answer = pair.both(prompt, GREEDY)
        assert reading["output_ids"] == []
        assert answer["output_ids"] == pair.single.generate(None, GREEDY, prompt)["output_ids"]
        assert answer["meta_info"]["cached_tokens"] == 0
        pair.check_nothing_leaks()


def test_a_full_pool_makes_requests_wait(tmp_path: Path) -> None:
    with pair_of(save_llama(tmp_path), max_total_tokens=160, max_running_requests=2) as pair:
        jobs = [text(70, seed) for seed in range(8)]
        expected = [pair.single.generate(None, GREEDY, ids)["output_ids"] for ids in jobs]
        with ThreadPoolExecutor(8) as threads:
            done = list(threads.map(lambda ids: pair.both(ids, GREEDY)[1]["output_ids"], jobs))
        assert done == expected
        pair.check_nothing_leaks()
