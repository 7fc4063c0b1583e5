"""An engine put together as on a GPU, with what a GPU would do pretended by the tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sapwood.app.building import gpu, resolving, runners, wiring
from sapwood.app.building.loading import LoadWatch
from sapwood.base.channel import CallbackSender, QueueChannel
from sapwood.base.errors import ConfigError
from sapwood.executor.cache_inputs import CachePlaces
from sapwood.executor.launch import QueuedExecutor
from sapwood.kernels import registry
from sapwood.schema.config.engine import EngineConfig
from sapwood.schema.output import EngineOutput, StepOutputs
from sapwood.schema.request import EngineInput, Generate, RequestOptions
from sapwood.schema.sampling import SamplingParams
from tests.adapters import write_adapter
from tests.executor.device_style import DeviceStyle
from tests.executor.recording_capture import RecordingCapture
from tests.executor.test_captured_adapters import note_launches
from tests.tiny import save_lfm2, save_qwen3_5, save_qwen3_moe

MIB = 2**20
OPTIONS = {
    "load_format": "dummy",
    "dtype": "float32",
    "num_threads": 1,
    "page_size": 4,
    "chunked_prefill_size": 16,
    "max_running_requests": 4,
    "skip_server_warmup": True,
    "context_length": 64,
}
MODULE = "tests.executor.device_style:DeviceStyle"


class PretendedMemory:
    """1 GiB in all; a step takes 1 MiB, captures take 2."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._free = 600 * MIB

    def free_and_total(self) -> tuple[int, int]:
        self._free -= 2 * MIB
        return self._free, 1024 * MIB

    def peak_bytes_of(self, run: Callable[[], None]) -> int:
        run()
        return MIB


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> list[RecordingCapture]:
    recorders = [RecordingCapture()]
    monkeypatch.setattr(runners, "runs_ahead", lambda device: True)
    monkeypatch.setattr(runners, "memory_of", PretendedMemory)
    monkeypatch.setattr(runners, "capture_on", lambda device: recorders[0])
    monkeypatch.setattr(registry.select_kernels, "__defaults__", (None, {"torch": MODULE}))
    return recorders


def run(
    model: Path, adapters: Sequence[str] = ("",), **options: object
) -> tuple[wiring.Engine, dict[str, list[int]]]:
    """Six requests, which have these adapters in turn."""
    before = torch.get_num_threads()
    values = {**OPTIONS, **options, "model": str(model)}
    resolved = resolving.resolve_config(EngineConfig.of(values), home=model)
    tokens: dict[str, list[int]] = {}
    finished: set[str] = set()

    def take(message: EngineOutput) -> None:
        assert isinstance(message, StepOutputs)
        for output in message.outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
            if output.finish is not None:
                finished.add(output.request_id)

    channel: QueueChannel[EngineInput] = QueueChannel()
    engine = wiring.build_engine(resolved, channel, CallbackSender(take))
    for index in range(6):
        prompt = [(7 * index + 3 * i) % 250 for i in range(1 + 5 * index)]
        # Greedy requests first, random ones last, and in between both of them in one step.
        sampling = SamplingParams(
            temperature=0.0 if index < 3 else 0.8,
            top_p=0.9,
            seed=index,
            max_new_tokens=9,
            ignore_eos=True,
        )
        channel.send(
            Generate(
                request_id=str(index),
                prompt_ids=prompt,
                options=RequestOptions(sampling=sampling, adapter=adapters[index % len(adapters)]),
            )
        )
    for _ in range(200):
        engine.loop.turn(0.0)
        if len(finished) == 6:
            break
    assert len(finished) == 6
    engine.executor.close()
    torch.set_num_threads(before)
    return engine, tokens


def test_it_puts_out_what_a_plain_engine_does(
    tiny_llama: Path, as_on_a_gpu: list[RecordingCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, tokens = run(tiny_llama, overlap_depth=2)
    assert isinstance(engine.executor, QueuedExecutor)
    notes = "\n".join(engine.ready.notes)
    assert "graphs = on (3 sizes of decode up to 4 requests and 1 sizes of prefill" in notes
    assert "2 MiB" not in notes
    assert sum(one.num_replays for one in as_on_a_gpu[0].recordings) > 10
    monkeypatch.undo()
    _, expected = run(tiny_llama, kernels="torch", max_total_tokens=512)
    assert tokens == expected


@pytest.mark.parametrize("save", [save_lfm2, save_qwen3_moe, save_qwen3_5])
def test_states_and_experts_are_captured_too(
    save: Callable[[Path], Path],
    tmp_path: Path,
    as_on_a_gpu: list[RecordingCapture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = save(tmp_path / "model")
    engine, tokens = run(model, overlap_depth=2)
    assert "graphs = on (3 sizes of decode" in "\n".join(engine.ready.notes)
    assert sum(one.num_replays for one in as_on_a_gpu[0].recordings) > 10
    monkeypatch.undo()
    _, expected = run(model, kernels="torch", max_total_tokens=512)
    assert tokens == expected


def test_a_reason_is_told_where_nothing_is_captured(
    tmp_path: Path, as_on_a_gpu: list[RecordingCapture], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_qwen3_moe(tmp_path / "model")
    monkeypatch.setattr(gpu, "runs_ahead", lambda device: True)
    monkeypatch.setattr(DeviceStyle, "captures_experts", False)
    reason = "the torch kernels read on the host which experts were chosen"
    engine, _ = run(model)
    assert f"graphs = off ({reason})" in "\n".join(engine.ready.notes)
    resolved = resolving.resolve_config(
        EngineConfig.of({**OPTIONS, "model": str(model)}), home=model
    )
    (decision,) = gpu.graphs_decisions(resolved)
    assert (decision.option, decision.reason) == (
        "disable_graphs",
        f"steps run op by op: {reason}",
    )


def test_steps_with_adapters_are_captured_too(
    tiny_llama: Path,
    tmp_path: Path,
    as_on_a_gpu: list[RecordingCapture],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Three adapters take turns in two slots."""
    ranks = {"narrow": 2, "wide": 24, "other": 5}
    for name, rank in ranks.items():
        write_adapter(tmp_path / name, rank)
    options = {
        "lora_paths": " ".join(f"{name}={tmp_path / name}" for name in ranks),
        "max_loras_per_batch": 2,
    }
    adapters = ("wide", "", "narrow", "other")
    note_launches(monkeypatch, as_on_a_gpu[0])
    module = "tests.executor.test_captured_adapters:AdaptedStyle"
    monkeypatch.setattr(registry.select_kernels, "__defaults__", (None, {"torch": module}))
    monkeypatch.setattr(gpu, "GRAPH_OVERHEAD_BYTES", MIB)
    engine, tokens = run(tiny_llama, adapters, overlap_depth=2, **options)
    assert ", also with adapters, captured in" in "\n".join(engine.ready.notes)
    assert sum(one.num_replays for one in as_on_a_gpu[0].recordings) > 10
    monkeypatch.undo()
    _, expected = run(tiny_llama, adapters, kernels="torch", max_total_tokens=512, **options)
    assert tokens == expected


def test_the_pool_is_what_the_measured_step_leaves(
    tiny_llama: Path, as_on_a_gpu: list[RecordingCapture]
) -> None:
    engine, _ = run(tiny_llama, disable_graphs=True)
    # Two layers, keys and values, one head of 32 in fp32.
    page_bytes = 2 * 2 * 4 * 32 * 4
    left = 598 * MIB - MIB - int(1024 * MIB * 0.02)
    assert engine.ready.max_total_tokens == left // page_bytes * 4
    assert "the largest step takes 0.00 GiB" in "\n".join(engine.ready.notes)
    captured, _ = run(tiny_llama)
    logits_bytes = 2 * 4 * 4 * 256  # of four requests, and what is computed from them
    less = MIB + logits_bytes + gpu.GRAPH_OVERHEAD_BYTES
    assert captured.ready.max_total_tokens == ((left - less) // page_bytes - 1) * 4


def test_an_asked_pool_is_kept(tiny_llama: Path, as_on_a_gpu: list[RecordingCapture]) -> None:
    engine, _ = run(tiny_llama, max_total_tokens=200)
    assert engine.ready.max_total_tokens == 200
    with pytest.raises(ConfigError, match="are left for it"):
        run(tiny_llama, max_total_tokens=400_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cuda_graph_bs": "1,8"}, "--cuda-graph-bs has 8, but no step is larger than 4"),
        (
            {"piecewise_cuda_graph_tokens": "17"},
            "--piecewise-cuda-graph-tokens has 17, but no step is larger than 16",
        ),
    ],
)
def test_sizes_that_no_step_can_have(
    tiny_llama: Path, options: dict[str, object], message: str
) -> None:
    asked = EngineConfig.of({**OPTIONS, "model": str(tiny_llama)})
    resolved = resolving.resolve_config(asked, home=tiny_llama)
    execution = replace(resolved.config.execution, **options)
    with pytest.raises(ConfigError, match=message):
        gpu.capture_plan(
            replace(resolved.config, execution=execution), resolved.decoder, CachePlaces(), (9,)
        )


def test_on_a_cpu_what_a_gpu_captures_is_refused(tiny_llama: Path) -> None:
    asked = EngineConfig.of({**OPTIONS, "model": str(tiny_llama), "cuda_graph_max_bs": 8})
    with pytest.raises(ConfigError, match="--cuda-graph-max-bs does nothing on a CPU"):
        resolving.resolve_config(asked, home=tiny_llama)


def test_progress_is_told_to_the_watchdog(tiny_llama: Path) -> None:
    beats: list[str] = []
    with gpu._bar(LoadWatch(beats.append)) as tell:
        tell(2, 5)
    assert beats == ["capturing steps, 2 of 5"]


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device, and this machine has none")
    return request.param


def test_graphs_and_overlap_change_nothing(tiny_llama: Path, device: str) -> None:
    pool = {"device": device, "max_total_tokens": 512}
    _, fast = run(tiny_llama, overlap_depth=2, **pool)
    _, plain = run(tiny_llama, disable_graphs=True, disable_overlap_schedule=True, **pool)
    assert fast == plain
