import pytest

from sapwood.base.errors import ConfigError
from sapwood.bench.workloads.presets import PRESETS, WORKLOAD_NAMES, WorkloadOptions
from sapwood.bench.workloads.vocabulary import TokenVocabulary

VOCABULARY = TokenVocabulary(tuple(range(1000, 2000)))


@pytest.mark.parametrize(
    ("name", "phases", "prompt_tokens", "output_tokens"),
    [
        ("a", [1], 128, 256),
        ("b", [1], 1024, 1),
        ("c", [32], 128, 128),
        ("d", [32], 1056, 32),
        ("w", [1, 31], 1056, 32),
    ],
)
def test_presets_have_the_lengths_of_the_documentation(name, phases, prompt_tokens, output_tokens):
    workload = PRESETS[name].generate(VOCABULARY, seed=0)
    assert [len(phase) for phase in workload.phases] == phases
    assert {len(request.prompt) for request in workload.requests} == {prompt_tokens}
    assert {request.num_output_tokens for request in workload.requests} == {output_tokens}
    if name in "dw":
        assert len({request.prompt[:1024] for request in workload.requests}) == 1
        assert len({request.prompt for request in workload.requests}) == 32


def test_options_make_a_workload():
    (spec,) = WorkloadOptions(workload="random", num_requests=3, min_ratio=1.0).specs()
    workload = spec.generate(VOCABULARY, seed=0)
    assert [len(request.prompt) for request in workload.requests] == [1024] * 3


def test_several_workloads_in_order():
    specs = WorkloadOptions(workload="c, a,fixed").specs()
    assert [spec.name for spec in specs] == ["c", "a", "fixed"]


def test_priming_is_an_option_of_shared_prefixes():
    (spec,) = WorkloadOptions(workload="shared-prefix", primed=True).specs()
    assert [len(phase) for phase in spec.generate(VOCABULARY, seed=0).phases] == [4, 28]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workload": "nothing"}, "unknown workload 'nothing'; known: fixed, random"),
        ({"workload": " , "}, "--workload names none"),
        ({"workload": "a", "num_requests": 2}, "a does not take --num-requests; use --workload"),
        (
            {"workload": "fixed", "prefix_tokens": 5, "suffix_tokens": 5},
            "does not take --prefix-tokens, --suffix-tokens; use --workload shared-prefix",
        ),
        ({"workload": "a", "num_requests": 1, "primed": True}, "leave them out"),
        ({"workload": "fixed", "primed": False}, "does not take --primed"),
    ],
)
def test_an_option_is_never_ignored(options, message):
    with pytest.raises(ConfigError, match=message):
        WorkloadOptions(**options)


def test_every_name_can_be_built():
    assert WorkloadOptions(workload=",".join(WORKLOAD_NAMES)).specs()
