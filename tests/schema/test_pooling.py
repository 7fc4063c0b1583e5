from __future__ import annotations

import pytest

from sapwood.schema.pooling import Pooling, why_not

EMBEDS = Pooling(task="embed", method="mean", why="", size=4)
CLASSIFIES = Pooling(task="classify", method="cls", why="", size=4, labels=("a", "b"))


@pytest.mark.parametrize(
    ("pooling", "able"), [(None, "tokens"), (EMBEDS, "embed"), (CLASSIFIES, "classify")]
)
def test_a_model_does_one_thing_and_says_which(pooling: Pooling | None, able: str) -> None:
    for wanted in ("tokens", "embed", "classify"):
        reason = why_not(pooling, wanted)
        assert (reason is None) == (wanted == able)
        if reason is not None:
            assert reason.startswith("this server's model ")
            assert "serve" in reason


@pytest.mark.parametrize(
    ("method", "decoder", "uses"),
    [
        ("last", "LlamaForCausalLM", True),
        ("mean", "LlamaForCausalLM", False),
        ("last", None, False),
    ],
)
def test_only_the_last_token_of_a_decoder_can_do_without_the_others(
    method: str, decoder: str | None, uses: bool
) -> None:
    pooling = Pooling(task="embed", method=method, why="", size=4, decoder=decoder)
    assert pooling.uses_prefixes == uses
    assert pooling.is_encoder == (decoder is None)
