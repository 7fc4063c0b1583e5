from dataclasses import replace

import pytest

from sapwood.base.clock import ManualClock
from sapwood.base.errors import ConfigError
from sapwood.bench.offline import (
    Generated,
    OfflineOptions,
    Repeat,
    in_process,
    measure_repeat,
    measure_workload,
    probe_spec,
)
from sapwood.bench.workloads.presets import PRESETS
from sapwood.bench.workloads.vocabulary import WORDS, TokenVocabulary, WordVocabulary
from sapwood.bench.workloads.workload import DECODE_RATE, FixedLengths, SharedPrefix, WorkloadSpec

TOKENS = TokenVocabulary(tuple(range(100, 200)))
SINGLE = WorkloadSpec(
    name="single",
    title="single",
    shape=FixedLengths(num_requests=1, prompt_tokens=10, output_tokens=21),
    headline=DECODE_RATE,
)
BATCH = replace(SINGLE, shape=FixedLengths(num_requests=3, prompt_tokens=10, output_tokens=4))


class ScriptedEngine:
    """Takes 1 s for a prefill and 0.1 s for every further step, on a clock of its own."""

    def __init__(self, *, short_by=0):
        self.clock = ManualClock()
        self.calls = []
        self.short_by = short_by

    def generate(self, prompts, output_lengths):
        self.calls.append((prompts, output_lengths))
        self.clock.advance(1.0 + 0.1 * (max(output_lengths) - 1))
        return [
            Generated(num_output_tokens=length - self.short_by, num_cached_tokens=2)
            for length in output_lengths
        ]


def test_a_single_stream_is_probed_for_its_decode_rate():
    engine = ScriptedEngine()
    repeat = measure_repeat(in_process(engine, engine.clock), SINGLE, TOKENS, seed=0, repeat=0)
    assert repeat.wall_s == pytest.approx(3.0)
    assert repeat.probe_s == pytest.approx(1.0)
    assert repeat.decode_tok_s == pytest.approx(10.0)
    assert repeat.output_tok_s == pytest.approx(7.0)
    (prompt,), (probe,) = (call[0] for call in engine.calls)
    assert len(prompt) == len(probe) == 10
    assert prompt != probe
    assert engine.calls[1][1] == [1]


def test_a_batch_is_not_probed():
    engine = ScriptedEngine()
    repeat = measure_repeat(in_process(engine, engine.clock), BATCH, TOKENS, seed=0, repeat=0)
    assert len(engine.calls) == 1
    assert repeat.decode_tok_s is None
    assert repeat.wall_s == pytest.approx(1.3)
    assert repeat.num_prompt_tokens == 30
    assert repeat.num_cached_tokens == 6
    assert repeat.output_tok_s == pytest.approx(12 / 1.3)
    assert repeat.total_tok_s == pytest.approx(42 / 1.3)
    assert repeat.warnings == ()


def test_phases_run_one_after_the_other():
    shape = SharedPrefix(
        prefix_groups=1,
        requests_per_group=3,
        prefix_tokens=8,
        suffix_tokens=2,
        output_tokens=1,
        primed=True,
    )
    engine = ScriptedEngine()
    repeat = measure_repeat(
        in_process(engine, engine.clock), replace(BATCH, shape=shape), TOKENS, seed=0, repeat=0
    )
    assert [len(prompts) for prompts, _ in engine.calls] == [1, 2]
    assert repeat.phase_s == pytest.approx((1.0, 1.0))


def test_repeats_have_prompts_of_their_own():
    engine = ScriptedEngine()
    heard = []
    result = measure_workload(
        in_process(engine, engine.clock),
        BATCH,
        TOKENS,
        OfflineOptions(repeats=4, num_warmups=2),
        seed=7,
        on_repeat=heard.append,
    )
    sent = [tuple(prompt) for prompts, _ in engine.calls for prompt in prompts]
    assert len(set(sent)) == len(sent) == 3 * 6
    assert tuple(heard) == result.repeats
    assert len(heard) == 4
    assert result.figures["wall_s"].median == pytest.approx(1.3)
    assert "decode_tok_s" not in result.figures
    assert result.workload["seed"] == 7


def test_wrong_lengths_are_warned_about():
    engine = ScriptedEngine(short_by=1)
    repeat = measure_repeat(in_process(engine, engine.clock), BATCH, TOKENS, seed=0, repeat=0)
    assert "3 of 3 outputs" in repeat.warnings[0]
    assert "3 tokens instead of 4" in repeat.warnings[0]
    assert repeat.num_output_tokens == 9


def test_lost_outputs_are_a_bug():
    class Forgetful:
        def generate(self, prompts, output_lengths):
            return []

    with pytest.raises(RuntimeError, match="3 prompts came back as 0"):
        measure_repeat(in_process(Forgetful()), BATCH, TOKENS, seed=0, repeat=0)


def test_text_prompts_cannot_be_run_offline():
    engine = ScriptedEngine()
    with pytest.raises(TypeError, match="token ids"):
        measure_repeat(in_process(engine), BATCH, WordVocabulary(WORDS), seed=0, repeat=0)


def test_a_probe_slower_than_its_run_gives_no_decode_rate():
    repeat = Repeat(
        phase_s=(1.0,),
        num_requests=1,
        num_prompt_tokens=1,
        num_output_tokens=2,
        num_cached_tokens=0,
        probe_s=1.5,
    )
    assert repeat.decode_tok_s is None
    assert repeat.figure("output_tok_s") == 2.0


def test_only_a_single_stream_with_outputs_has_a_probe():
    assert {name for name, spec in PRESETS.items() if probe_spec(spec) is not None} == {"a"}


@pytest.mark.parametrize("options", [{"repeats": 0}, {"num_warmups": -1}])
def test_options_out_of_range_are_refused(options):
    with pytest.raises(ConfigError, match="must be >="):
        OfflineOptions(**options)
