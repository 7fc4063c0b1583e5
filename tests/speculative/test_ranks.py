from __future__ import annotations

from sapwood.schema.draft_tree import ROOT
from sapwood.schema.step import GuessedTokens
from sapwood.speculative.interface import NO_GUESSES
from sapwood.speculative.ranks import BroughtDrafter


def test_what_a_rank_guesses_is_proposed_until_tokens_follow() -> None:
    draft = BroughtDrafter().begin("", [1, 2])
    assert draft.propose(4) == NO_GUESSES
    draft.bring(GuessedTokens([5, 6, 7]))
    assert draft.propose(2).token_ids == [5, 6]
    assert draft.propose(2).kinds == [0, 0]
    assert not draft.propose(0).token_ids
    draft.extend([])
    assert draft.propose(9).token_ids == [5, 6, 7]
    draft.extend([5])
    assert draft.propose(9) == NO_GUESSES


def test_siblings_are_of_different_kinds() -> None:
    draft = BroughtDrafter().begin("", [1, 2])
    draft.bring(GuessedTokens([5, 6, 7, 8, 9], [ROOT, 0, 0, ROOT, 3]))
    assert list(draft.propose(9).kinds) == [0, 0, 1, 1, 0]
    shallow = draft.propose(1)
    assert (shallow.token_ids, shallow.parents, shallow.kinds) == ([5, 8], [ROOT, ROOT], [0, 1])
