from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from sapwood.frontends.serving.generate import merged


class Source:
    """Yields `count` numbers, then raises `error` if there is one; notes that it was closed."""

    def __init__(self, count: int, error: Exception | None = None) -> None:
        self.count = count
        self.error = error
        self.closed = False

    async def stream(self):
        try:
            for i in range(self.count):
                await asyncio.sleep(0)
                yield i
            if self.error is not None:
                raise self.error
        finally:
            self.closed = True


@pytest.mark.parametrize("num_streams", [1, 2, 5])
def test_every_item_comes_once_in_its_streams_order(num_streams):
    async def run():
        sources = [Source(i + 2) for i in range(num_streams)]
        return [item async for item in merged([source.stream() for source in sources])]

    items = asyncio.run(run())
    for position in range(num_streams):
        assert [item for at, item in items if at == position] == list(range(position + 2))


@pytest.mark.parametrize("num_streams", [1, 3])
def test_leaving_early_closes_every_stream(num_streams):
    sources = [Source(1000) for _ in range(num_streams)]

    async def run():
        async with aclosing(merged([source.stream() for source in sources])) as items:
            for _ in range(2 * num_streams):
                await anext(items)

    asyncio.run(run())
    assert all(source.closed for source in sources)


def test_the_first_error_ends_all():
    sources = [Source(1000), Source(1, error=ValueError("broken")), Source(1000)]

    async def run():
        return [item async for item in merged([source.stream() for source in sources])]

    with pytest.raises(ValueError, match="broken"):
        asyncio.run(run())
    assert all(source.closed for source in sources)
