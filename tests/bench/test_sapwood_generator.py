from types import SimpleNamespace

import pytest

from sapwood.base.errors import SapwoodError
from sapwood.bench.offline import Generated
from sapwood.bench.sapwood_generator import SapwoodGenerator
from sapwood.schema.output import Finish


class FakeLlm:
    def __init__(self, finish):
        self.finish = finish
        self.asked = []

    def generate(self, prompts, sampling):
        self.asked = list(zip(prompts, sampling, strict=True))
        return [
            SimpleNamespace(
                finish=self.finish,
                num_output_tokens=params.max_new_tokens,
                num_cached_tokens=len(prompt) - 1,
            )
            for prompt, params in self.asked
        ]


def test_lengths_are_forced_per_prompt():
    llm = FakeLlm(Finish(kind="length"))
    outputs = SapwoodGenerator(llm).generate([(1, 2), (3, 4, 5)], [7, 9])
    assert outputs == [
        Generated(num_output_tokens=7, num_cached_tokens=1),
        Generated(num_output_tokens=9, num_cached_tokens=2),
    ]
    for (prompt, params), wanted in zip(llm.asked, [7, 9], strict=True):
        assert isinstance(prompt, list)
        assert params.min_new_tokens == params.max_new_tokens == wanted
        assert params.ignore_eos
        assert params.is_greedy


@pytest.mark.parametrize("kind", ["error", "abort"])
def test_a_request_that_did_not_end_well_stops_the_benchmark(kind):
    llm = FakeLlm(Finish(kind=kind, message="out of pages"))
    with pytest.raises(SapwoodError, match=f"{kind}: out of pages"):
        SapwoodGenerator(llm).generate([(1, 2)], [7])
