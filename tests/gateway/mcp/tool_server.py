"""An MCP server with a few tools, made with the official library; as a program it speaks stdio."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from mcp.server.mcpserver import MCPServer
from mcp.types import ToolAnnotations


@dataclass
class Seen:
    """What the tools were asked."""

    notes: list[str] = field(default_factory=list)
    is_waiting: asyncio.Event = field(default_factory=asyncio.Event)
    was_cancelled: asyncio.Event = field(default_factory=asyncio.Event)


def tool_server(seen: Seen) -> MCPServer:
    server = MCPServer("tools")

    @server.tool(annotations=ToolAnnotations(read_only_hint=True))
    def add(a: int, b: int) -> str:
        """Adds two numbers."""
        return str(a + b)

    @server.tool(name="take.note")
    def take_note(text: str) -> str:
        """Writes something down."""
        seen.notes.append(text)
        return f"noted {text}"

    @server.tool()
    def repeat(num_chars: int) -> str:
        """Says x so often."""
        return "x" * num_chars

    @server.tool()
    async def wait() -> str:
        """Waits for ever."""
        seen.is_waiting.set()
        try:
            await asyncio.Event().wait()
        finally:
            seen.was_cancelled.set()
        return ""

    return server


if __name__ == "__main__":
    tool_server(Seen()).run("stdio")
