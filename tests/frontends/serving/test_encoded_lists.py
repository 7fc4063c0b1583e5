"""Long lists are encoded in pieces, and others have their turn in between."""

from __future__ import annotations

import asyncio
import struct

import orjson

from sapwood.frontends.serving import encoded_lists
from sapwood.frontends.serving.encoded_lists import EncodedList, in_pieces
from sapwood.schema.logprobs import TokenLogprobs


def test_a_list_is_the_json_of_its_items() -> None:
    encoded, items = EncodedList(), list[object]()
    assert orjson.dumps(encoded.json) == b"[]"
    for part in ([1, "a,]"], [], [None], [[1.5, {"b": [2]}], (3, None)]):
        encoded.extend(part)
        items += part
        assert orjson.loads(orjson.dumps({"list": encoded.json})) == orjson.loads(
            orjson.dumps({"list": items})
        )


def test_pieces_are_small_and_others_have_their_turn_between_them() -> None:
    num_positions, num_per_token = 5000, 4
    values = TokenLogprobs(tokens=struct.pack(f"<{num_positions}f", *range(num_positions)))
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    async def work() -> list[tuple[int, int]]:
        other = asyncio.create_task(others())
        got: list[tuple[int, int]] = []
        sizes: list[int] = []
        async for first, ids, part in in_pieces(range(num_positions), values, num_per_token):
            assert first == len(got)
            sizes.append(len(part))
            got += zip(ids, map(int, part.of_tokens()), strict=True)
        other.cancel()
        assert max(sizes) * num_per_token <= encoded_lists.LOGPROBS_AT_A_TIME
        assert turns >= len(sizes) - 1 > 1
        return got

    assert asyncio.run(work()) == [(one, one) for one in range(num_positions)]
