"""The radix tree of computed prefixes: token ids to what these tokens left behind in each pool.

One tree per namespace; a `Branch` begins below a page of another. An edge carries
whole pages only: its key is the bytes of its tokens (4 per token, little-endian) and its length is
a multiple of the page size. A node that some request uses is locked, and so is every node above it;
the rest can be evicted.

Each pool has its own part of a node. Pages that keep every token go leaves first. A window's pages
may go anywhere in the tree, from a node's first tokens on: what lies behind a window is of no use,
and the node stays for the other pools. A state stands for all tokens before it, and exists at the
end of some nodes only. So a prefix can be used up to the last place where every pool has what a
request needs to go on.

Source: Zheng et al. 2023, arXiv:2312.07104.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

from sapwood.memory.eviction import EvictionKey
from sapwood.memory.listener import CacheListener, Stretch
from sapwood.memory.namespace import Namespace, base_of, end_from, place_at
from sapwood.memory.node import TOKEN_BYTES, EvictionQueue, Node, WindowPart
from sapwood.schema.cache import FULL_POOL, CacheKind, CachePool


def token_key(token_ids: Iterable[int]) -> bytes:
    """The bytes that stand for these tokens in the tree's keys."""
    return array("I", token_ids).tobytes()


def first_needed_page(window: int, num_computed: int, page_size: int) -> int:
    """The first page that the token after `num_computed` tokens looks at."""
    return max(num_computed - window + 1, 0) // page_size


@dataclass(frozen=True, slots=True)
class Match:
    """The longest known prefix from which a request can go on.

    node     where it ends; stays valid while it is locked
    length   number of its pages of tokens
    pages    its pages in the pool that keeps every token
    windows  per window pool: the pages of the tokens that the next token looks at
    """

    node: Node
    length: int
    pages: list[int]
    windows: list[list[int]] = field(default_factory=list)


class PrefixTree:
    """Prefixes of all namespaces. It knows pages and slots by number and owns those that it holds.

    num_pages            pages in the pool that keeps every token; num_evictable_pages of them are
                         not locked
    num_window_pages     the same per window pool; num_evictable_window_pages
    num_states           states; num_evictable_states of them are not pinned
    freed                per pool: numbers that the tree holds no longer; the ledger takes them
    """

    def __init__(
        self,
        page_size: int,
        eviction_key: Callable[[int, int], EvictionKey],
        pools: Sequence[CachePool] = (FULL_POOL,),
        listener: CacheListener | None = None,
    ) -> None:
        """An empty tree.

        eviction_key  of (num_hits, last_used); a use never makes it smaller
        pools         as `pools_of` orders them: one part of a node per pool
        listener      hears of everything that the tree begins or ceases to keep
        """
        self._page_size = page_size
        self._page_bytes = page_size * TOKEN_BYTES
        self._eviction_key = eviction_key
        self._listener = listener
        self._roots: dict[str, Node] = {}
        self._num_uses = 0
        self._full = next((at for at, pool in enumerate(pools) if pool.kind is CacheKind.FULL), -1)
        self._state = next(
            (at for at, pool in enumerate(pools) if pool.kind is CacheKind.STATE), -1
        )
        windows = [(at, pool.window) for at, pool in enumerate(pools) if pool.window is not None]
        self.windows = tuple(window for _, window in windows)
        self._window_pools = tuple(at for at, _ in windows)
        self._is_plain = self._full == 0 and len(pools) == 1
        self._leaves = EvictionQueue(self._key_of, self._is_candidate)
        self._window_queues = tuple(
            EvictionQueue(self._key_of, _has_window_pages(index))
            for index in range(len(self.windows))
        )
        self._states = EvictionQueue(self._key_of, _has_loose_state)
        self.num_pages = 0
        self.num_evictable_pages = 0
        self.num_window_pages = [0] * len(self.windows)
        self.num_evictable_window_pages = [0] * len(self.windows)
        self.num_states = 0
        self.num_evictable_states = 0
        self.freed: list[list[int]] = [[] for _ in pools]
        self._is_asked = False  # whether what is forgotten now is forgotten on request

    # ---- finding -----------------------------------------------------------------------------

    def path(self, namespace: Namespace, key: bytes) -> list[tuple[Node, int]]:
        """The nodes along the longest usable prefix, each with how many of its pages match.

        Changes nothing, so it serves for planning.
        """
        steps = self._known(namespace, key)
        return steps if self._is_plain or not steps else self._usable(steps)

    def match(self, namespace: Namespace, key: bytes) -> Match:
        """The longest usable prefix of `key`; a node that matches in part is split there."""
        node, length, pages = self._end_of(namespace, self.path(namespace, key))
        if not self.windows:
            return Match(node, length, pages)
        firsts = [
            first_needed_page(window, length * self._page_size, self._page_size)
            for window in self.windows
        ]
        windows = [self.window_pages(node, length, i, first) for i, first in enumerate(firsts)]
        return Match(node, length, pages, windows)

    def window_pages(self, node: Node, end: int, window: int, first: int) -> list[int]:
        """The pages first .. end - 1 of a window pool on the path to `node`, which ends at `end`
        and must have them."""
        pages: list[int] = []
        walker: Node | None = node
        while walker is not None and end > first:
            pages = walker.windows[window].pages[max(first - end, -walker.length) :] + pages
            end -= walker.length
            walker = walker.parent
        return pages

    def known(self, namespace: Namespace, key: bytes) -> tuple[Node, int]:
        """The node where the longest prefix of `key` ends whose pages are all there in the pool
        that keeps every token, and their number; nothing else need be there."""
        steps = self._known(namespace, key)
        if not steps:
            return self._root(base_of(namespace)), 0
        return steps[-1][0], sum(num_pages for _, num_pages in steps)

    def _known(self, namespace: Namespace, key: bytes) -> list[tuple[Node, int]]:
        steps: list[tuple[Node, int]] = []
        node = self._roots.get(base_of(namespace))
        offset = 0
        while node is not None:
            child = node.children.get(place_at(namespace, key, offset, self._page_bytes))
            if child is None:
                break
            end = end_from(namespace, key, offset, self._page_bytes)
            num_pages = self._common_pages(child.key, key[:end], offset)
            steps.append((child, num_pages))
            if num_pages < child.length:
                break
            offset += len(child.key)
            node = child
        return steps

    def _usable(self, steps: list[tuple[Node, int]]) -> list[tuple[Node, int]]:
        """The steps up to the last place from which a request can go on.

        In a run of window pages without a gap the last place is as good as any, so only the ends of
        nodes are looked at, and the end of the match."""
        start = 0
        runs = [0] * len(self.windows)  # where the run of pages before this place begins
        usable = 0
        for index, (node, num_pages) in enumerate(steps):
            end = start + num_pages
            for at, part in enumerate(node.windows):
                num_missing = node.length - len(part.pages)
                if num_missing:
                    runs[at] = start + min(num_missing, num_pages)
            has_state = self._state < 0 or (num_pages == node.length and node.state is not None)
            if has_state and all(
                first_needed_page(window, end * self._page_size, self._page_size) >= run
                for window, run in zip(self.windows, runs, strict=True)
            ):
                usable = index + 1
            start = end
        return steps[:usable]

    def _end_of(
        self, namespace: Namespace, steps: list[tuple[Node, int]]
    ) -> tuple[Node, int, list[int]]:
        """(node that ends where the steps end, their length, their pages)"""
        if not steps:
            return self._root(base_of(namespace)), 0, []
        last, num_pages = steps[-1]
        if num_pages < last.length:
            last = self._split(last, num_pages)
        nodes = [node for node, _ in steps[:-1]] + [last]
        length = sum(num_pages for _, num_pages in steps)
        return last, length, [page for node in nodes for page in node.pages]

    # ---- keeping -----------------------------------------------------------------------------

    def insert(
        self,
        namespace: Namespace,
        key: bytes,
        pages: Sequence[int],
        windows: Sequence[tuple[int, Sequence[int]]] = (),
    ) -> tuple[Node, list[int]]:
        """Remember what the tokens of `key` (whole pages of tokens) left behind.

        pages    in the pool that keeps every token, if the model has one
        windows  per window pool (first, pages from the first-th on, up to the key's end)

        Returns the node where the key ends and the tree's own pages for it. Where these differ from
        `pages`, the tree knew that part before and did not take the page given for it. Which pages
        it has in a window pool `window_pages` tells.
        """
        length = len(key) // self._page_bytes
        assert len(key) == length * self._page_bytes, "a key must be whole pages"
        assert len(pages) == length or self._full < 0, "a key has a page for each page of tokens"
        node, known, own = self._end_of(namespace, self._known(namespace, key))
        while known < length:
            parts = tuple(WindowPart([]) for _ in self.windows)
            offset = known * self._page_bytes
            below = key[offset : end_from(namespace, key, offset, self._page_bytes)]
            end = known + len(below) // self._page_bytes
            parent = node
            node = Node(parent, below, end - known, list(pages[known:end]), parts)
            node.place = place_at(namespace, key, offset, self._page_bytes)
            self._num_uses += 1
            node.last_used = self._num_uses
            parent.children[node.place] = node
            self.num_pages += len(node.pages)
            self.num_evictable_pages += len(node.pages)
            self._tell_stored(node, self._full, node.length, node.pages)
            own, known = own + node.pages, end
        for index, (first, given) in enumerate(windows):
            self._fill(node, length, index, first, given)
        self._leaves.offer(node)
        return node, own

    def put_state(self, node: Node, length: int, end: int, slot: int) -> Node | None:
        """Keep a state after `end` pages of the prefix of `length` pages that ends at `node`.

        Returns the node that has it now. None: the tree has that state already, or does not know
        the place, and `slot` stays the caller's."""
        found = self.node_at(node, length, end)
        if found.parent is None or found.state is not None:
            return None
        found.state = slot
        self.num_states += 1
        self.num_evictable_states += 1
        self._states.offer(found)
        self._tell_stored(found, self._state, found.length, [slot])
        return found

    def node_at(self, node: Node, length: int, end: int) -> Node:
        """The node on the path to `node` that ends after `end` pages; a split makes it, if need
        be."""
        while length - node.length >= end and node.parent is not None:
            length -= node.length
            node = node.parent
        return node if length == end else self._split(node, node.length - (length - end))

    def _fill(self, node: Node, end: int, index: int, first: int, given: Sequence[int]) -> None:
        """Take the pages that the path to `node` lacks in a window pool out of those given."""
        walker: Node | None = node
        while walker is not None and end > first:
            start = end - walker.length
            part = walker.windows[index]
            gap_end = end - len(part.pages)
            taken = given[max(start - first, 0) : max(gap_end - first, 0)]
            if taken:
                part.pages[:0] = taken
                self.num_window_pages[index] += len(taken)
                if not part.num_locks:
                    self.num_evictable_window_pages[index] += len(taken)
                    self._window_queues[index].offer(walker)
                self._tell_stored(walker, self._window_pools[index], gap_end - start, taken)
            end, walker = start, walker.parent

    # ---- using -------------------------------------------------------------------------------

    def lock(self, node: Node) -> None:
        """Keep this prefix until `unlock`."""
        walker: Node | None = node
        while walker is not None:
            if walker.num_locks == 0:
                self.num_evictable_pages -= len(walker.pages)
            walker.num_locks += 1
            walker = walker.parent

    def unlock(self, node: Node) -> None:
        walker: Node | None = node
        while walker is not None:
            assert walker.num_locks > 0, "a prefix was unlocked more often than locked"
            walker.num_locks -= 1
            if walker.num_locks == 0:
                self.num_evictable_pages += len(walker.pages)
                self._leaves.offer(walker)
            walker = walker.parent
        if self._full < 0:
            self._prune(node)
        self._drop_empty_roots(node)

    def count_hit(self, node: Node) -> None:
        """For the eviction policy: a request goes on from this prefix."""
        self._num_uses += 1
        walker: Node | None = node
        while walker is not None:
            walker.num_hits += 1
            walker.last_used = self._num_uses
            if self._listener is not None and walker.parent is not None:
                self._tell_used(walker, self._listener)
            walker = walker.parent

    def lock_window(self, node: Node, index: int) -> None:
        """Keep this one node's pages in a window pool until `unlock_window`."""
        part = node.windows[index]
        self.num_evictable_window_pages[index] -= part.num_evictable
        part.num_locks += 1

    def unlock_window(self, node: Node, index: int) -> None:
        part = node.windows[index]
        assert part.num_locks > 0, "a window was unlocked more often than locked"
        part.num_locks -= 1
        self.num_evictable_window_pages[index] += part.num_evictable
        self._window_queues[index].offer(node)

    def pin_state(self, node: Node) -> None:
        """Keep this node's state until `unpin_state`."""
        assert node.state is not None
        self.num_evictable_states -= node.num_pins == 0
        node.num_pins += 1

    def unpin_state(self, node: Node) -> None:
        assert node.num_pins > 0, "a state was unpinned more often than pinned"
        node.num_pins -= 1
        self.num_evictable_states += node.num_pins == 0
        self._states.offer(node)

    # ---- forgetting --------------------------------------------------------------------------

    def evict(self, num_pages: int) -> list[int]:
        """Forget that many pages of unused prefixes, or all there are if they are fewer.

        What other pools kept of these tokens goes too, into `freed`."""
        evicted: list[int] = []
        while len(evicted) < num_pages:
            leaf = self._leaves.take()
            if leaf is None:
                break
            evicted += self._shorten(leaf, num_pages - len(evicted))
        self.num_pages -= len(evicted)
        self.num_evictable_pages -= len(evicted)
        return evicted

    def evict_window(self, index: int, num_pages: int) -> None:
        """Give away that many pages of a window pool, or all that no lease holds, into `freed`."""
        left = num_pages
        while left > 0:
            node = self._window_queues[index].take()
            if node is None:
                break
            gone = node.windows[index].pages[:left]
            self._give_window(node, index, gone)
            left -= len(gone)
            self._window_queues[index].offer(node)
            self._prune(node)

    def evict_state(self, kept: frozenset[int] = frozenset()) -> None:
        """Forget the state used longest ago that no lease has pinned, into `freed`.

        kept: slots of states that stay"""
        passed: list[Node] = []
        node = self._states.take()
        while node is not None and node.state in kept:
            passed.append(node)
            node = self._states.take()
        for one in passed:
            self._states.offer(one)
        if node is not None:
            self._drop_state(node)
            self._prune(node)

    def take_over_state(self, node: Node) -> int:
        """Forget a state that one lease has pinned; its slot is that lease's from now on."""
        assert node.num_pins == 1
        assert node.state is not None
        self.unpin_state(node)
        self._is_asked = True
        self._drop_state(node)
        self._is_asked = False
        return self.freed[self._state].pop()

    def forget(self) -> list[int]:
        """Forget everything that no lease uses, on request. Returns pages as `evict` does."""
        listener = self._listener
        if listener is not None and not any(root.num_locks for root in self._roots.values()):
            listener.cleared()
            self._listener = None  # it has heard of all
        self._is_asked = True
        pages = self.evict(self.num_pages)
        for index, num_pages in enumerate(self.num_evictable_window_pages):
            self.evict_window(index, num_pages)
        while self.num_evictable_states:
            self.evict_state()
        self._is_asked = False
        self._listener = listener
        return pages

    def nodes(self) -> Iterator[Node]:
        """Every node but the roots."""
        stack = [child for root in self._roots.values() for child in root.children.values()]
        while stack:
            node = stack.pop()
            yield node
            stack.extend(node.children.values())

    def check(self) -> None:
        """The counters are true, and what can be evicted is noted once. For tests; slow."""
        nodes = list(self.nodes())
        assert self.num_pages == sum(len(node.pages) for node in nodes)
        loose = sum(len(node.pages) for node in nodes if node.num_locks == 0)
        assert self.num_evictable_pages == loose, "evictable pages are miscounted"
        assert len(self._leaves) == sum(node in self._leaves for node in nodes), "notes pile up"
        assert all(node in self._leaves for node in nodes if self._is_candidate(node))
        for index, queue in enumerate(self._window_queues):
            parts = [(node, node.windows[index]) for node in nodes]
            assert self.num_window_pages[index] == sum(len(part.pages) for _, part in parts)
            loose = sum(part.num_evictable for _, part in parts)
            assert self.num_evictable_window_pages[index] == loose, "a window is miscounted"
            assert all(node in queue for node, part in parts if part.num_evictable)
            assert all(part.num_locks <= node.num_locks for node, part in parts)
        states = [node for node in nodes if node.state is not None]
        assert self.num_states == len(states)
        loose_states = [node for node in states if node.num_pins == 0]
        assert self.num_evictable_states == len(loose_states), "states are miscounted"
        assert all(node in self._states for node in loose_states), "a state is lost"
        assert all(
            node.pages or node.children or node.num_locks or node.state is not None
            or any(part.pages for part in node.windows)
            for node in nodes
        ), "a node without content stays"  # fmt: skip

    # ---- the shape of the tree ---------------------------------------------------------------

    def _root(self, namespace: str) -> Node:
        root = self._roots.get(namespace)
        if root is None:
            parts = tuple(WindowPart([]) for _ in self.windows)
            root = self._roots[namespace] = Node(None, b"", 0, [], parts)
            root.namespace = namespace
        return root

    def _drop_empty_roots(self, node: Node) -> None:
        """Namespaces come from requests: one that holds nothing must not stay in memory."""
        if node.namespace is not None and not node.children and node.num_locks == 0:
            self._roots.pop(node.namespace, None)

    def _common_pages(self, edge: bytes, key: bytes, offset: int) -> int:
        size = self._page_bytes
        if key.startswith(edge, offset):
            return len(edge) // size
        num_pages = 0
        limit = min(len(edge), len(key) - offset) // size
        while num_pages < limit:
            start = num_pages * size
            if edge[start : start + size] != key[offset + start : offset + start + size]:
                break
            num_pages += 1
        return num_pages

    def _split(self, node: Node, num_pages: int) -> Node:
        """Cut the node after `num_pages`; the new upper part is returned, locks and uses kept.

        A state stays at the end, with the lower part."""
        at = num_pages * self._page_bytes
        assert node.parent is not None, "a root holds no pages"
        parts = []
        for part in node.windows:
            num_above = max(len(part.pages) - (node.length - num_pages), 0)
            parts.append(WindowPart(part.pages[:num_above], part.num_locks))
            part.pages = part.pages[num_above:]
        upper = Node(node.parent, node.key[:at], num_pages, node.pages[:num_pages], tuple(parts))
        upper.num_locks = node.num_locks
        upper.num_hits = node.num_hits
        upper.last_used = node.last_used
        upper.digests, node.digests = node.digests[:num_pages], node.digests[num_pages:]
        upper.place, node.place = node.place, node.key[at : at + self._page_bytes]
        node.parent.children[upper.place] = upper
        node.parent = upper
        node.key = node.key[at:]
        node.length -= num_pages
        node.pages = node.pages[num_pages:]
        upper.children[node.place] = node
        for queue in self._window_queues:
            queue.offer(upper)
        return upper

    def _shorten(self, leaf: Node, num_pages: int) -> list[int]:
        """Take up to `num_pages` off the leaf's end; the whole leaf goes if none are left."""
        kept = max(leaf.length - num_pages, 0)
        taken = leaf.pages[kept:]
        self._tell_gone(leaf, self._full, leaf.length, taken)
        for index, part in enumerate(leaf.windows):
            gone = part.pages[max(len(part.pages) - (leaf.length - kept), 0) :]
            self._give_window(leaf, index, gone, from_end=True)
        if leaf.state is not None:
            self._drop_state(leaf)
        if kept:
            del leaf.pages[kept:]
            leaf.length = kept
            leaf.key = leaf.key[: kept * self._page_bytes]
            del leaf.digests[kept:]
            self._leaves.offer(leaf)
        else:
            self._remove(leaf)
        return taken

    def _remove(self, leaf: Node) -> None:
        parent = leaf.parent
        assert parent is not None, "a root is never a candidate"
        del parent.children[leaf.place]
        leaf.parent = None
        self._leaves.offer(parent)
        self._drop_empty_roots(parent)

    def _prune(self, node: Node) -> None:
        """Remove the node if nothing is left in it, and then those above it likewise."""
        while (
            node.parent is not None
            and not node.children
            and not node.num_locks
            and not node.pages
            and node.state is None
            and not any(part.pages for part in node.windows)
        ):
            parent = node.parent
            self._remove(node)
            node = parent

    def _give_window(
        self, node: Node, index: int, gone: Sequence[int], *, from_end: bool = False
    ) -> None:
        if not gone:
            return
        part = node.windows[index]
        assert not part.num_locks, "a lease holds this window"
        pool = self._window_pools[index]
        end = node.length if from_end else node.length - len(part.pages) + len(gone)
        self._tell_gone(node, pool, end, gone)
        part.pages = part.pages[: -len(gone)] if from_end else part.pages[len(gone) :]
        self.num_window_pages[index] -= len(gone)
        self.num_evictable_window_pages[index] -= len(gone)
        self.freed[pool] += gone

    def _drop_state(self, node: Node) -> None:
        assert node.state is not None
        assert not node.num_pins, "a lease goes on from this state"
        self._tell_gone(node, self._state, node.length, [node.state])
        self.freed[self._state].append(node.state)
        node.state = None
        self.num_states -= 1
        self.num_evictable_states -= 1

    def _is_candidate(self, node: Node) -> bool:
        return bool(
            node.parent is not None and node.num_locks == 0 and not node.children and node.pages
        )

    def _key_of(self, node: Node) -> EvictionKey:
        return self._eviction_key(node.num_hits, node.last_used)

    # ---- events ------------------------------------------------------------------------------

    def _tell_stored(self, node: Node, pool: int, end: int, numbers: Sequence[int]) -> None:
        """`end` counts pages from the beginning of the node."""
        if self._listener is not None and numbers:
            self._listener.stored(Stretch(node, pool, end, numbers, self._page_size))

    def _tell_used(self, node: Node, listener: CacheListener) -> None:
        parts = [(self._full, node.pages)]
        parts += [
            (pool, part.pages) for pool, part in zip(self._window_pools, node.windows, strict=True)
        ]
        parts += [] if node.state is None else [(self._state, [node.state])]
        for pool, numbers in parts:
            if numbers:
                listener.used(Stretch(node, pool, node.length, numbers, self._page_size))

    def _tell_gone(self, node: Node, pool: int, end: int, numbers: Sequence[int]) -> None:
        """`end` counts pages from the beginning of the node."""
        if self._listener is not None and numbers:
            tell = self._listener.removed if self._is_asked else self._listener.evicted
            tell(Stretch(node, pool, end, numbers, self._page_size))


def _has_window_pages(index: int) -> Callable[[Node], bool]:
    return lambda node: node.parent is not None and node.windows[index].num_evictable > 0


def _has_loose_state(node: Node) -> bool:
    return node.parent is not None and node.state is not None and node.num_pins == 0
