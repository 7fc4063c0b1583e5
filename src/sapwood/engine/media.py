"""Vectors of pictures, videos and sounds: which the ranks have, who uses them, which to make.

A medium is encoded once, before the step that first needs its vectors, whoever shows it. Its
vectors stay until others need their bytes and no running request has to compute tokens with them.
Vectors that layers attend to across are needed for every token of a request.
Like pages, vectors change hands in the order of plans.
"""

from __future__ import annotations

import sys
from collections import OrderedDict, deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from sapwood.engine.request_state import RequestState
from sapwood.schema.media import Medium
from sapwood.schema.output import MediaUse
from sapwood.schema.request import Generate


class MediaFacts(Protocol):
    """What a tower says of media before it computes anything.

    attends_both_ways  whether the tokens of a picture must be computed in one step
    """

    @property
    def attends_both_ways(self) -> bool: ...

    def why_unfit(self, medium: Medium) -> str | None: ...

    def num_patches(self, medium: Medium) -> int: ...


NOTHING_HEARD = (
    "this model answers only requests with a sound, to which its layers attend; send a file to "
    "/v1/audio/transcriptions"
)


NUM_KEPT = 3
"""Steps with encoding whose times count, the slowest."""

REST_STEPS = 4
"""Steps without encoding after one with it, while requests decode."""


@dataclass(slots=True)
class Vectors:
    """Of one medium.

    num_users  running requests that have tokens to compute with them
    """

    num_bytes: int
    num_users: int = 0


class MediaVectors:
    """The scheduler's account of vectors on the ranks, least recently used first."""

    def __init__(
        self,
        facts: MediaFacts,
        *,
        vector_bytes: int,
        max_bytes: int,
        patches_per_step: int,
        target_s: float = 0.0,
        must_hear: bool = False,
    ) -> None:
        """An account without vectors.

        vector_bytes      of one token
        max_bytes         of all vectors at any time
        patches_per_step  that are encoded before a step, unless one medium alone has more
        target_s          seconds that encoding before a step may take while requests decode, as
                          far as what was measured tells; 0: as long as it takes
        must_hear         whether every request needs a sound, since the model's layers attend to it
        """
        self._facts = facts
        self._attends_both_ways = facts.attends_both_ways
        self._vector_bytes = vector_bytes
        self._max_bytes = max_bytes
        self._patches_per_step = patches_per_step
        self._target_s = target_s
        self._patch_s: deque[float] = deque(maxlen=NUM_KEPT)
        self._others_decode = False
        self._must_hear = must_hear
        self._known: OrderedDict[bytes, Vectors] = OrderedDict()
        self._held: dict[str, set[bytes]] = {}  # by request id
        self._encodes: dict[bytes, Medium] = {}
        self._forgets: list[bytes] = []
        self._num_patches = 0
        self._rest = 0
        self.num_bytes = 0
        self.num_encoded = 0
        self.num_shared = 0
        self.encoding_s = 0.0

    @property
    def num_held(self) -> int:
        """Pairs of a running request and a medium whose vectors it holds."""
        return sum(map(len, self._held.values()))

    @property
    def use(self) -> MediaUse:
        return MediaUse(
            num_encoded=self.num_encoded,
            num_shared=self.num_shared,
            num_bytes=self.num_bytes,
            max_bytes=self._max_bytes,
            encoding_s=self.encoding_s,
        )

    def why_refused(self, request: Generate) -> str | None:
        """Why a request with its media cannot be served; None if it can."""
        if not request.media:
            return NOTHING_HEARD if self._must_hear else None
        spans = [span for medium in request.media for span in medium.spans]
        if self._must_hear and len(request.media) > 1:
            return "this model hears one sound at a time; send a request for each"
        if request.input_embeds:
            return "a prompt of input_embeds can show no pictures; send text or token ids"
        end = 0
        for start, length in spans:
            if start < end or length < 1:
                return "the places of pictures in a prompt must follow one another"
            end = start + length
        if end > len(request.prompt_ids):
            return "the place of a picture ends after the prompt"
        for medium in request.media:
            if not medium.spans or len(medium.digest) != 32:
                return "a prepared medium needs a place in the prompt and a digest of 32 bytes"
            wrong = self._facts.why_unfit(medium)
            if wrong is not None:
                return wrong
            num_bytes = medium.num_vectors * self._vector_bytes
            if num_bytes > self._max_bytes:
                return (
                    f"a {medium.kind} stands for {medium.num_vectors} tokens, whose vectors take "
                    f"{num_bytes} bytes, but all vectors of this server may take "
                    f"{self._max_bytes}; send a smaller one, or start the server with a larger "
                    "--vlm-cache-size-mb"
                )
        return None

    # ---- steps -------------------------------------------------------------------------------

    def begin_step(self, *, others_decode: bool = False) -> None:
        """others_decode: then the steps after one that encodes only decode, so that most gaps
        between two tokens are as long as ever, however many pictures wait."""
        self._others_decode = others_decode
        if not others_decode:
            self._rest = 0
        elif self._num_patches:
            self._rest = REST_STEPS
        elif self._rest:
            self._rest -= 1
        self._num_patches = 0

    def grant(self, state: RequestState, start: int, num_new: int) -> int:
        """How many of `num_new` tokens from `start` on the next step can compute, as far as vectors
        go. The request holds those of these tokens from now on, until it has computed them or
        leaves; what is missing is ordered.

        More than `num_new` if a picture begins at `start`, does not end before them and has to be
        computed in one step."""
        if self._attends_both_ways:
            num_new = _without_cut(state.media, start, start + num_new) - start
        for medium, first in _shown(state.media, start, start + num_new):
            if not self._hold(state.request_id, medium):
                return max(first - start, 0)
        return num_new

    def computed(self, state: RequestState, num_computed: int) -> None:
        """Let go the vectors of tokens that a plan computes."""
        held = self._held.get(state.request_id)
        if not held:
            return
        needed = {medium.digest for medium in state.media if _end_of(medium) > num_computed}
        for digest in held - needed:
            self._let_go(held, digest)
        if not held:
            del self._held[state.request_id]

    def encoded(self, media: Sequence[Medium], seconds: float) -> None:
        """The vectors of a plan's media were made, in so many seconds."""
        self.encoding_s += seconds
        num_patches = sum(map(self._facts.num_patches, media))
        if num_patches and seconds > 0.0:
            self._patch_s.append(seconds / num_patches)

    def leave(self, state: RequestState) -> None:
        """Let go all that the request holds."""
        held = self._held.pop(state.request_id, set())
        for digest in list(held):
            self._let_go(held, digest)

    def take_orders(self) -> tuple[list[Medium], list[bytes]]:
        """(media to be encoded, digests of those to be forgotten before) since the last call."""
        orders = list(self._encodes.values()), self._forgets
        self._encodes, self._forgets = {}, []
        return orders

    def check(self) -> None:
        """Every vector has its users, and the bytes are right. For tests; slow."""
        users = [digest for held in self._held.values() for digest in held]
        for digest, vectors in self._known.items():
            assert vectors.num_users == users.count(digest), "users are miscounted"
        assert all(digest in self._known for digest in users), "held vectors were forgotten"
        assert self.num_bytes == sum(one.num_bytes for one in self._known.values())
        assert self.num_bytes <= self._max_bytes, "vectors take more than they may"

    # ---- the account -------------------------------------------------------------------------

    def _hold(self, request_id: str, medium: Medium) -> bool:
        held = self._held.get(request_id, set())
        if medium.digest in held:
            return True
        vectors = self._known.get(medium.digest)
        if vectors is None:
            vectors = self._ordered(medium)
            if vectors is None:
                return False
        else:
            self.num_shared += 1
        self._known.move_to_end(medium.digest)
        vectors.num_users += 1
        self._held.setdefault(request_id, held).add(medium.digest)
        return True

    def _ordered(self, medium: Medium) -> Vectors | None:
        """Order that medium's vectors; None if this step cannot encode it."""
        if self._rest:
            return None
        num_patches = self._facts.num_patches(medium)
        if self._num_patches and self._num_patches + num_patches > self._most_patches():
            return None
        num_bytes = medium.num_vectors * self._vector_bytes
        if not self._make_room(num_bytes):
            return None
        self._num_patches += num_patches
        self.num_bytes += num_bytes
        self.num_encoded += 1
        self._encodes[medium.digest] = medium
        vectors = self._known[medium.digest] = Vectors(num_bytes)
        return vectors

    def _most_patches(self) -> float:
        """That the next step may encode, unless one medium alone has more."""
        if not (self._target_s and self._others_decode):
            return self._patches_per_step
        if not self._patch_s:
            return 0
        return min(self._patches_per_step, self._target_s / max(self._patch_s))

    def _make_room(self, num_bytes: int) -> bool:
        idle = [(key, one.num_bytes) for key, one in self._known.items() if not one.num_users]
        room = self._max_bytes - self.num_bytes
        if room + sum(size for _, size in idle) < num_bytes:
            return False
        for digest, size in idle:
            if room >= num_bytes:
                break
            del self._known[digest]
            self.num_bytes -= size
            room += size
            if self._encodes.pop(digest, None) is None:
                self._forgets.append(digest)
        return True

    def _let_go(self, held: set[bytes], digest: bytes) -> None:
        held.remove(digest)
        self._known[digest].num_users -= 1


def _end_of(medium: Medium) -> int:
    start, length = _places(medium)[-1]
    return start + length


def _places(medium: Medium) -> tuple[tuple[int, int], ...]:
    """The spans of the tokens that cannot be computed without the medium's vectors."""
    return ((0, sys.maxsize),) if medium.num_across else medium.spans


def _shown(media: Sequence[Medium], start: int, end: int) -> Iterator[tuple[Medium, int]]:
    """The media that tokens `start` .. `end` - 1 show, and the first of these tokens that does."""
    for medium in media:
        for first, length in _places(medium):
            if first < end and first + length > start:
                yield medium, max(first, start)
                break


def _without_cut(media: Sequence[Medium], start: int, end: int) -> int:
    """Where tokens from `start` on may end so that no picture is cut: at `end`, before the picture
    in which that lies, or, if they begin in it, behind it."""
    for medium in media:
        for first, length in medium.spans:
            if first < end < first + length:
                return first if first > start else first + length
    return end
