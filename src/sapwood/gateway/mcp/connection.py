"""One connection to an MCP server, by the official library, made when the first request needs it.

The library wants a connection to be closed by the task that opened it, so a task of its own holds
each one. After a failure the connection is given up as soon as nobody else waits for an answer on
it, and the next request makes a new one.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx2
import orjson
from mcp import Client, MCPError, StdioServerParameters, stdio_client
from mcp.client.sse import sse_client
from mcp.client.streamable_http import streamable_http_client
from mcp.types import CallToolResult, EmbeddedResource, TextContent, TextResourceContents

from sapwood.base.errors import SapwoodError
from sapwood.gateway.mcp.config import Server, Sse, Stdio

log = logging.getLogger(__name__)

T = TypeVar("T")

MAX_TOOLS = 256
"""Of one server."""
CONNECT_S = 30.0
IDLE_S = 300.0
"""Of a stream that the server keeps open."""
MAX_MESSAGE_CHARS = 1000
"""Of a server's error message that is passed on."""


class ServerFailed(SapwoodError):
    """An MCP server gives no answer, or none that the protocol knows."""

    status = 424
    type = "FailedDependencyError"


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerTool:
    """A tool as its server lists it; schema: JSON Schema of its arguments."""

    name: str
    description: str | None
    schema: dict[str, Any]
    is_read_only: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a call has come to: `text` for the model, and whether the call failed."""

    text: str
    is_error: bool


class Connection:
    """A server's tools. Any task may call the methods.

    timeout_s         of one call, and of one list of tools, with connecting if that is needed
    max_result_bytes  of a call's result; a longer one is a failure that the model is told
    """

    def __init__(self, server: Server, *, timeout_s: float, max_result_bytes: int) -> None:
        self.name = server.name
        self._server = server
        self._timeout_s = timeout_s
        self._max_result_bytes = max_result_bytes
        self._num_waiting = 0
        self._task: asyncio.Task[None] | None = None
        self._ended: set[asyncio.Task[None]] = set()
        self._ready: asyncio.Future[Client] | None = None
        self._end = asyncio.Event()

    async def tools(self) -> Sequence[ServerTool]:
        """All tools of the server, asked for anew. Raises ServerFailed."""
        was_open = self._task is not None
        try:
            return await self._ask(_list_tools)
        except ServerFailed:
            # The connection may have died since it was last used, and a list does no harm twice.
            if not was_open or self._task is not None:
                raise
            return await self._ask(_list_tools)

    async def call(self, name: str, arguments: Mapping[str, Any]) -> Outcome:
        """Call a tool once; a call that fails is an outcome too, for the model to see."""
        try:
            result = await self._ask(lambda client: client.call_tool(name, dict(arguments)))
        except ServerFailed as error:
            return Outcome(text=error.message, is_error=True)
        text = _text(result)
        num_bytes = len(text.encode("utf-8", "replace"))
        if num_bytes > self._max_result_bytes:
            return Outcome(
                text=f"the result has {num_bytes} bytes, but at most {self._max_result_bytes} are "
                "taken; ask for less",
                is_error=True,
            )
        return Outcome(text=text, is_error=result.is_error)

    async def close(self) -> None:
        self._give_up()
        await asyncio.gather(*self._ended, return_exceptions=True)

    async def _ask(self, question: Callable[[Client], Awaitable[T]]) -> T:
        self._num_waiting += 1
        is_good = False
        try:
            async with asyncio.timeout(self._timeout_s):
                answer = await question(await self._client())
            is_good = True
            return answer
        except TimeoutError:
            raise ServerFailed(
                f"the MCP server {self.name!r} did not answer within {self._timeout_s:g} s"
            ) from None
        except MCPError as error:
            message = error.message[:MAX_MESSAGE_CHARS]
            raise ServerFailed(f"the MCP server {self.name!r} failed: {message}") from None
        except Exception as error:
            log.warning("the MCP server %r failed", self.name, exc_info=True)
            raise ServerFailed(
                f"the MCP server {self.name!r} failed; the gateway's log says why"
            ) from error
        finally:
            self._num_waiting -= 1
            if not is_good and self._num_waiting == 0:
                self._give_up()

    async def _client(self) -> Client:
        if self._ready is None or self._task is None or self._task.done():
            self._ready = asyncio.get_running_loop().create_future()
            self._end = asyncio.Event()
            self._task = asyncio.create_task(self._hold(self._ready, self._end))
        # A client that leaves must not end the connection for all others.
        return await asyncio.shield(self._ready)

    async def _hold(self, ready: asyncio.Future[Client], end: asyncio.Event) -> None:
        try:
            async with AsyncExitStack() as stack:
                client = await stack.enter_async_context(await _connected(self._server, stack))
                ready.set_result(client)
                await end.wait()
        except Exception as error:
            if ready.done():
                log.warning("the connection to the MCP server %r ended", self.name, exc_info=True)
                return
            ready.set_exception(error)
            ready.exception()  # Those who asked may have left: then nobody else looks at it.
        finally:
            ready.cancel()

    def _give_up(self) -> None:
        task, ready = self._task, self._ready
        self._task = self._ready = None
        if task is None or ready is None:
            return
        self._ended.add(task)
        task.add_done_callback(self._ended.discard)
        if ready.done():
            self._end.set()
        else:
            task.cancel()


async def _connected(server: Server, stack: AsyncExitStack) -> Client:
    if isinstance(server, Stdio):
        program = StdioServerParameters(command=server.command, args=server.args, env=server.envs)
        transport = stdio_client(program, errlog=sys.__stderr__ or sys.stderr)
    elif isinstance(server, Sse):
        transport = sse_client(
            server.url,
            headers=server.sent_headers,
            timeout=CONNECT_S,
            sse_read_timeout=IDLE_S,
        )
    else:
        http = await stack.enter_async_context(
            httpx2.AsyncClient(
                headers=server.sent_headers, timeout=httpx2.Timeout(CONNECT_S, read=IDLE_S)
            )
        )
        transport = streamable_http_client(server.url, http_client=http)
    return Client(transport, cache=None)


async def _list_tools(client: Client) -> Sequence[ServerTool]:
    tools: list[ServerTool] = []
    cursor: str | None = None
    while True:
        page = await client.list_tools(cursor=cursor)
        for tool in page.tools:
            is_read_only = tool.annotations is not None and tool.annotations.read_only_hint
            tools.append(
                ServerTool(
                    name=tool.name,
                    description=tool.description,
                    schema=tool.input_schema,
                    is_read_only=bool(is_read_only),
                )
            )
        if len(tools) > MAX_TOOLS:
            raise MCPError(-32000, f"it has more than {MAX_TOOLS} tools")
        cursor = page.next_cursor
        if cursor is None:
            return tools
        if not page.tools:
            raise MCPError(-32000, "a page of its list of tools is empty, but not the last one")


def _text(result: CallToolResult) -> str:
    if not result.content and result.structured_content is not None:
        return orjson.dumps(result.structured_content).decode()
    parts = []
    for block in result.content:
        if isinstance(block, TextContent):
            parts.append(block.text)
        elif isinstance(block, EmbeddedResource) and isinstance(
            block.resource, TextResourceContents
        ):
            parts.append(block.resource.text)
        else:
            parts.append(f"[{block.type}: left out, only text is passed on]")
    return "\n".join(parts)
