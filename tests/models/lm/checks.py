"""The ways in which one text can go through a decoder; all must give transformers' logits."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests.models.lm.harness import Session
from tests.models.lm.peer import Peer, random_text

ATOL = 1e-4
TEXT = random_text(71)


def check_at_once(session: Session, peer: Peer) -> None:
    torch.testing.assert_close(session.step({"a": TEXT})["a"], peer.logits(TEXT), atol=ATOL, rtol=0)


def check_in_chunks(size: int) -> Callable[[Session, Peer], None]:
    def check(session: Session, peer: Peer) -> None:
        got = session.in_chunks("a", TEXT, size)
        torch.testing.assert_close(got, peer.logits(TEXT), atol=ATOL, rtol=0)

    return check


def check_after_prefix_hit(session: Session, peer: Peer) -> None:
    session.step({"a": TEXT[:40]})
    session.share("a", "b", 40)
    session.step({"a": TEXT[40:]})
    tail = random_text(23, seed=5)
    got = session.step({"b": tail})["b"]
    want = peer.logits(TEXT[:40] + tail)[40:]
    torch.testing.assert_close(got, want, atol=ATOL, rtol=0)


def check_beside_others(session: Session, peer: Peer) -> None:
    """Two decodes of different length, a chunk with a past, and a new prompt, in one step."""
    texts = {name: random_text(70, seed=i) for i, name in enumerate("abcd")}
    session.step({"a": texts["a"][:50], "b": texts["b"][:8], "c": texts["c"][:13]})
    step = {
        "a": texts["a"][50:51],
        "b": texts["b"][8:9],
        "c": texts["c"][13:30],
        "d": texts["d"][:33],
    }
    got = session.step(step)
    ends = {"a": (50, 51), "b": (8, 9), "c": (13, 30), "d": (0, 33)}
    for name, (start, end) in ends.items():
        want = peer.logits(texts[name][:end])[start:]
        torch.testing.assert_close(got[name], want, atol=ATOL, rtol=0)


CHECKS: dict[str, Callable[[Session, Peer], None]] = {
    "at once": check_at_once,
    "chunks of 1": check_in_chunks(1),
    "chunks of 7": check_in_chunks(7),
    "chunks of 64": check_in_chunks(64),
    "prefix hit": check_after_prefix_hit,
    "beside others": check_beside_others,
}
