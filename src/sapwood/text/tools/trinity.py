"""Trinity: like Qwen 2.5, but calls stand between the tags of the thinking too.

<think><tool_call>
{"name": "f", "arguments": {…}}
</tool_call></think>
"""

from __future__ import annotations

from sapwood.text.tools.qwen25 import BEGIN, END, Qwen25


class Trinity(Qwen25):
    """Where a reasoning parser has taken the thinking out, there are no calls in it."""

    name = "trinity"
    strays = ("<think>", "</think>")
    tags = (BEGIN, END, *strays)
