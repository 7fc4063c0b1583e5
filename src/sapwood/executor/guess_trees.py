"""Trees of guesses that a draft model makes: it computes the likeliest guesses so far, each of
which gets children, and so on; in the end the likeliest guesses of all stay.

How likely a guess is follows from the probabilities that the draft model gave to the tokens on the
way to it. Source: Li et al. 2024 (EAGLE-2), arXiv:2406.16858, sections 4.1 and 4.2. Other than
there, the chain of first guesses always stays, so a tree has all that a chain would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from sapwood.executor.drafting import Sampled, Sampling
from sapwood.schema.draft_tree import ROOT
from sapwood.schema.step import GuessedTokens, ScheduledTokens


@dataclass(frozen=True, slots=True, kw_only=True)
class TreeLimits:
    """breadth  guesses that may follow the same token, and guesses of a request that the draft
             model computes at once; 1: guesses are chains
    most     guesses of one request
    """

    breadth: int = 1
    most: int = 1


class GuessTree:
    """The guesses for one request.

    frontier  guesses that get children next; at first the root
    """

    def __init__(self, breadth: int) -> None:
        self._breadth = breadth
        self._token_ids: list[int] = []
        self._parents: list[int] = []
        self._chances: list[float] = []
        self._is_first: list[bool] = []
        self.frontier = [ROOT]

    def grow(self, children: Sequence[Sequence[tuple[int, float]]]) -> None:
        """Let guesses follow those of the frontier; the likeliest of the new ones are the next.

        children  of each guess of the frontier: tokens and their probabilities, likely ones first
        """
        start = len(self._token_ids)
        for parent, found in zip(self.frontier, children, strict=True):
            chance = 1.0 if parent == ROOT else self._chances[parent]
            is_first = parent == ROOT or self._is_first[parent]
            for place, (token_id, probability) in enumerate(found):
                self._token_ids.append(token_id)
                self._parents.append(parent)
                # Rounding may leave a sum of probabilities above 1.
                self._chances.append(chance * min(probability, 1.0))
                self._is_first.append(is_first and place == 0)
        self.frontier = self._likeliest(range(start, len(self._token_ids)), self._breadth)

    def way_to(self, node: int) -> list[int]:
        """The tokens from the root to a guess, itself included."""
        found: list[int] = []
        while node != ROOT:
            found.append(self._token_ids[node])
            node = self._parents[node]
        return found[::-1]

    def parent_of(self, node: int) -> int:
        return self._parents[node]

    def before(self, nodes: Sequence[int]) -> list[int]:
        """These guesses and all that they follow, ascending, so without the root."""
        found = set[int]()
        for node in nodes:
            while node != ROOT and node not in found:
                found.add(node)
                node = self._parents[node]
        return sorted(found)

    def picked(self, nodes: Sequence[int]) -> GuessedTokens:
        """Some guesses in this order; each comes after the guess that it follows."""
        place = {ROOT: ROOT} | {node: index for index, node in enumerate(nodes)}
        return GuessedTokens(
            [self._token_ids[node] for node in nodes],
            [place[self._parents[node]] for node in nodes],
        )

    def best(self, most: int) -> GuessedTokens:
        """The likeliest guesses, at most so many; the likeliest way through them comes first."""
        following: dict[int, list[int]] = {}
        for node in self._likeliest(range(len(self._token_ids)), most):
            following.setdefault(self._parents[node], []).append(node)
        nodes, waiting = list[int](), following.get(ROOT, [])[::-1]
        while waiting:
            nodes.append(waiting.pop())
            waiting += following.get(nodes[-1], [])[::-1]
        found = self.picked(nodes)
        is_chain = found.parents == list(range(ROOT, len(nodes) - 1))
        return GuessedTokens(found.token_ids) if is_chain else found

    def _likeliest(self, nodes: Sequence[int], most: int) -> list[int]:
        """The first guesses first. No guess comes before one that it follows."""
        return sorted(
            nodes, key=lambda node: (not self._is_first[node], -self._chances[node], node)
        )[:most]


@dataclass(frozen=True, slots=True)
class TreeSpan:
    """What a draft model computes to find the children of a tree's frontier: the request's last
    known token, and the guesses on the ways to the frontier.

    The keys of all these tokens are written, also those of earlier spans, since attention tells
    apart only the tokens of one span. So a span is short, and no attention needs another mask.

    entry    its tokens; the first is the last known one
    nodes    guesses of the tree, in the order of the entry's drafts
    """

    one: Sampled
    tree: GuessTree
    entry: ScheduledTokens
    nodes: list[int]

    @classmethod
    def of(cls, one: Sampled, tree: GuessTree, position: int) -> TreeSpan:
        """position  place of the last known token's key"""
        nodes = tree.before(tree.frontier)
        picked = tree.picked(nodes)
        entry = ScheduledTokens(
            row=one.entry.row,
            position=position,
            token_ids=[one.token_ids[-1]],
            draft_ids=picked.token_ids,
            draft_parents=picked.parents,
            first_page=0,
            pages=[],
            num_output=0,
        )
        return cls(one, tree, entry, nodes)


def frontiers_at(spans: Sequence[TreeSpan]) -> list[int]:
    """The places of all frontiers, one span after the other, among the tokens of a step."""
    found: list[int] = []
    start = 0
    for span in spans:
        place = {node: start + 1 + index for index, node in enumerate(span.nodes)}
        found += [place[node] for node in span.tree.frontier]
        start += span.entry.num_new
    return found


class TreeGuesser:
    """Lets trees of guesses grow for all requests of a step together."""

    def __init__(self, limits: TreeLimits, sampling: Sampling) -> None:
        self._limits = limits
        self._sampling = sampling

    def guess(
        self,
        logits: Tensor,
        going: Sequence[Sampled],
        compute: Callable[[Sequence[TreeSpan]], Tensor],
        *,
        shift: int,
    ) -> dict[int, GuessedTokens]:
        """Guesses by the entry's index.

        logits   [len(going), vocab] after each request's last known token
        compute  the logits [S, vocab] after each token of the spans' frontiers, in order
        shift    what is added to the last known token's index for the place of its key
        """
        breadth = self._limits.breadth
        trees = {one.index: GuessTree(breadth) for one in going}
        depth = 0
        with self._sampling.guessing([one.entry.row for one in going]):
            while going:
                asked = [(one, node) for one in going for node in trees[one.index].frontier]
                children = iter(
                    self._sampling.children(
                        logits,
                        [one.entry.row for one, _ in asked],
                        [
                            (one.entry.num_output or 0) + len(one.token_ids) + depth
                            for one, _ in asked
                        ],
                        [trees[one.index].way_to(node) for one, node in asked],
                        breadth,
                    )
                )
                for one in going:
                    tree = trees[one.index]
                    tree.grow([next(children) for _ in tree.frontier])
                depth += 1
                going = [
                    one for one in going if one.num_guesses > depth and trees[one.index].frontier
                ]
                if going:
                    logits = compute(
                        [
                            TreeSpan.of(one, trees[one.index], one.num_known - 1 + shift)
                            for one in going
                        ]
                    )
        return {index: tree.best(self._limits.most) for index, tree in trees.items()}
