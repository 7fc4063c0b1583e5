"""`LLM(dp_size=2)`: engines in processes of their own, used like the one of this process."""

from __future__ import annotations

from collections.abc import Callable

import psutil
import pytest

from sapwood import LLM
from sapwood.base.errors import EngineUnavailable


@pytest.mark.long
def test_replicas_share_the_prompts_and_end_with_the_llm(make_llm: Callable[..., LLM]) -> None:
    prompts = [[1, 2, 3, i] for i in range(16)]
    greedy = {"max_new_tokens": 8, "temperature": 0}
    expected = [one.token_ids for one in make_llm().generate(prompts, greedy)]
    before = {child.pid for child in psutil.Process().children()}
    llm = make_llm(dp_size=2, load_balance_method="round_robin")
    assert [one.token_ids for one in llm.generate(prompts, greedy)] == expected
    each = [llm.run(engine.status()) for engine in llm.services.replicas]
    assert [status.num_finished for status in each] == [8, 8]
    assert llm.stats().num_finished == 16
    assert llm.flush_cache()
    llm.close()
    assert {child.pid for child in psutil.Process().children()} == before
    with pytest.raises(EngineUnavailable, match="closed"):
        llm.generate("x")
