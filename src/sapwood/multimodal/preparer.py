"""From the media of a prompt to its token ids and what the engine gets beside them."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

from sapwood.base.errors import InvalidRequest, Overloaded, SapwoodError, UnsupportedFeature
from sapwood.multimodal.family import FamilySetting, family_of
from sapwood.multimodal.fetch import Fetcher
from sapwood.multimodal.job import Job, Result
from sapwood.multimodal.pool import PreparingPool
from sapwood.observe.preparing import PreparingFigures
from sapwood.schema.media import MediaTensor, Medium
from sapwood.schema.media_source import MAX_MEDIA, MediaKind, MediaSource

Encode = Callable[[str, bool], Awaitable[list[int]]]
"""(text, whether it is a whole prompt, to which the tokenizer may add its special tokens)"""


class MediaPreparer:
    """
    token_ids     kind -> the id of the family's token, whose place the vectors take
    most_of_kind  kind -> how many of it a request may have
    max_calls     requests whose media are fetched and prepared at a time
    """

    def __init__(
        self,
        setting: FamilySetting,
        fetcher: Fetcher,
        *,
        token_ids: dict[str, int],
        num_copies: int,
        timeout_s: float,
        most_of_kind: Mapping[str, int],
        max_calls: int,
    ) -> None:
        self._family = family_of(setting)
        self._fetcher = fetcher
        self._pool = PreparingPool(setting, fetcher.limits, num_copies=num_copies)
        self._token_ids = token_ids
        self._timeout_s = timeout_s
        self._most_of_kind = most_of_kind
        self._turn = asyncio.Semaphore(max_calls)
        self.figures = PreparingFigures()

    @property
    def markers(self) -> dict[MediaKind, str]:
        """Of each kind that the model takes: the text in a prompt that stands for one."""
        family = self._family
        return {kind: text for kind, text in family.markers.items() if kind in self._token_ids}

    async def prepare(
        self, prompt: str | list[int], sources: Sequence[MediaSource], encode: Encode
    ) -> tuple[list[int], list[Medium]]:
        """The prompt's token ids with a place for each vector, and the media in the same order.

        prompt  with the family's marker for each of the sources, as the chat template writes it;
                as token ids, it may have the places of all vectors already
        Raises  InvalidRequest that names the medium's place in the request
        """
        if len(sources) > MAX_MEDIA:
            raise InvalidRequest(
                f"the request has {len(sources)} pictures and videos but this server takes at most "
                f"{MAX_MEDIA}",
                param=sources[MAX_MEDIA].where,
            )
        self._check_counts(sources)
        with self.figures.waiting():
            await self._turn.acquire()
        try:
            with self.figures.opened():
                results = await self._all(sources)
        finally:
            self._turn.release()
        if isinstance(prompt, str):
            text, ordered = self._replaced(prompt, sources, results)
            return self._expanded(await encode(text, True), ordered)
        ordered = [(source.kind, one) for source, one in zip(sources, results, strict=True)]
        found = self._placed(prompt, ordered)
        if found is not None:
            return found
        ids, ordered = await self._replaced_ids(prompt, ordered, encode)
        return self._expanded(ids, ordered)

    async def _all(self, sources: Sequence[MediaSource]) -> list[Result]:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._tried(source)) for source in sources]
        results: list[Result] = []
        for task in tasks:
            outcome = task.result()
            if isinstance(outcome, SapwoodError):
                raise outcome
            results.append(outcome)
        return results

    def _check_counts(self, sources: Sequence[MediaSource]) -> None:
        for kind, most in self._most_of_kind.items():
            of_kind = [source for source in sources if source.kind == kind]
            if len(of_kind) > most:
                raise InvalidRequest(
                    f"the request has {len(of_kind)} media of the kind {kind} but "
                    f"--limit-mm-data-per-request of this server allows {most}",
                    param=of_kind[most].where,
                )

    def close(self) -> None:
        self._pool.close()

    async def _tried(self, source: MediaSource) -> Result | SapwoodError:
        """A refusal is returned, so that the first one in the prompt's order is told."""
        try:
            with self.figures.timed():
                return await self._prepared(source)
        except InvalidRequest as error:
            kind = type(error)
            return kind(f"{source.where} {error.message}", param=source.where)
        except Overloaded as error:
            return error
        except TimeoutError:
            return InvalidRequest(
                f"{source.where} was not fetched within {self._timeout_s:g} s", param=source.where
            )

    async def _prepared(self, source: MediaSource) -> Result:
        if source.kind not in self._family.markers or source.kind not in self._token_ids:
            raise UnsupportedFeature(
                f"is of the kind {source.kind}, which this model does not take"
            )
        async with asyncio.timeout(self._timeout_s):
            urls = source.frames or (source.url,)
            pieces = [source.data] if source.data else []
            if not pieces:
                kind: MediaKind = "image" if source.frames else source.kind
                pieces = [await self._fetcher.bytes_of(url, kind) for url in urls]
        job = Job(
            id=0,
            kind=source.kind,
            raw_size=source.raw_size,
            sizes=tuple(map(len, pieces)) if source.frames else (),
            options=dict(source.options),
        )
        return await self._pool.prepare(job, pieces)

    def _replaced(
        self, prompt: str, sources: Sequence[MediaSource], results: Sequence[Result]
    ) -> tuple[str, list[tuple[MediaKind, Result]]]:
        """The prompt with each marker replaced by its medium's text, and the media in its order."""
        kinds = {marker: kind for kind, marker in self._family.markers.items()}
        pieces = re.split("(" + "|".join(map(re.escape, kinds)) + ")", prompt)
        waiting: dict[MediaKind, list[Result]] = {kind: [] for kind in kinds.values()}
        for source, result in zip(sources, results, strict=True):
            waiting[source.kind].append(result)
        ordered: list[tuple[MediaKind, Result]] = []
        for at in range(1, len(pieces), 2):
            kind = kinds[pieces[at]]
            if not waiting[kind]:
                raise _miscounted(pieces[at], len(pieces) // 2, len(sources))
            result = waiting[kind].pop(0)
            ordered.append((kind, result))
            pieces[at] = result.replacement
        if any(waiting.values()):
            raise _miscounted(" or ".join(kinds), len(pieces) // 2, len(sources))
        return "".join(pieces), ordered

    async def _replaced_ids(
        self,
        prompt: Sequence[int],
        given: Sequence[tuple[MediaKind, Result]],
        encode: Encode,
    ) -> tuple[list[int], list[tuple[MediaKind, Result]]]:
        """`_replaced` for a prompt of token ids: the marker is a row of them."""
        markers = {
            kind: await encode(marker, False) for kind, marker in self._family.markers.items()
        }
        waiting = {kind: [one for own, one in given if own == kind] for kind in markers}
        ids: list[int] = []
        ordered: list[tuple[MediaKind, Result]] = []
        at = 0
        while at < len(prompt):
            kind = next((k for k, m in markers.items() if prompt[at : at + len(m)] == m), None)
            if kind is None:
                ids.append(prompt[at])
                at += 1
                continue
            if not waiting[kind]:
                raise _miscounted(self._family.markers[kind], len(ordered) + 1, len(given))
            result = waiting[kind].pop(0)
            ordered.append((kind, result))
            ids += await encode(result.replacement, False)
            at += len(markers[kind])
        if any(waiting.values()):
            raise _miscounted(" or ".join(self._family.markers.values()), len(ordered), len(given))
        return ids, ordered

    def _placed(
        self, prompt: Sequence[int], ordered: Sequence[tuple[MediaKind, Result]]
    ) -> tuple[list[int], list[Medium]] | None:
        """The prompt and its media, if it has a place for each vector already; else None."""
        own = {self._token_ids[kind] for kind, _ in ordered}
        places = [at for at, token_id in enumerate(prompt) if token_id in own]
        if len(places) != sum(sum(result.counts) for _, result in ordered):
            return None
        media: list[Medium] = []
        done = 0
        for kind, result in ordered:
            spans: list[tuple[int, int]] = []
            for count in result.counts:
                first = places[done]
                row = range(first, first + count)
                if places[done : done + count] != list(row) or any(
                    prompt[at] != self._token_ids[kind] for at in row
                ):
                    return None
                spans.append((first, count))
                done += count
            media += _media(kind, result, spans)
        return list(prompt), media

    def _expanded(
        self, token_ids: Sequence[int], ordered: Sequence[tuple[MediaKind, Result]]
    ) -> tuple[list[int], list[Medium]]:
        """Each of the family's tokens becomes as many as its medium has vectors there."""
        places = [
            (index, kind, count)
            for index, (kind, result) in enumerate(ordered)
            for count in result.counts
        ]
        own = {self._token_ids[kind] for kind, _ in ordered}
        spans: list[list[tuple[int, int]]] = [[] for _ in ordered]
        expanded: list[int] = []
        position = 0
        for token_id in token_ids:
            if token_id not in own:
                expanded.append(token_id)
                continue
            if position == len(places) or self._token_ids[places[position][1]] != token_id:
                raise _miscounted("the placeholder token", position + 1, len(ordered))
            index, _, count = places[position]
            position += 1
            spans[index].append((len(expanded), count))
            expanded += [token_id] * count
        if position != len(places):
            raise _miscounted("the placeholder token", position, len(ordered))
        media: list[Medium] = []
        for (kind, one), of_one in zip(ordered, spans, strict=True):
            media += _media(kind, one, of_one)
        return expanded, media


def _media(kind: MediaKind, result: Result, spans: Sequence[tuple[int, int]]) -> Iterator[Medium]:
    """The medium, or its parts, which are encoded one by one."""
    if result.parts == 1:
        yield Medium(kind=kind, digest=result.digest, tensors=result.tensors, spans=tuple(spans))
        return
    step = len(spans) // result.parts
    for part in range(result.parts):
        yield Medium(
            kind=kind,
            digest=hashlib.sha256(result.digest + part.to_bytes(4, "little")).digest(),
            tensors={
                name: _rows(tensor, part, result.parts) for name, tensor in result.tensors.items()
            },
            spans=tuple(spans[part * step : (part + 1) * step]),
        )


def _rows(tensor: MediaTensor, part: int, parts: int) -> MediaTensor:
    count, *others = tensor.shape
    size = len(tensor.data) // parts
    return MediaTensor(
        dtype=tensor.dtype,
        shape=(count // parts, *others),
        data=tensor.data[part * size : (part + 1) * size],
    )


def _miscounted(what: str, found: int, wanted: int) -> InvalidRequest:
    return InvalidRequest(
        f"the prompt has {what} {found} times but the request has {wanted} pictures and videos; "
        "leave such tokens out of the texts, or use a chat template that writes one for each",
        param="messages",
    )
