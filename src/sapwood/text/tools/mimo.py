"""MiMo: like Qwen3-Coder, with values on the line of their tags; either parser reads both.

<tool_call><function=NAME><parameter=p>v</parameter></function></tool_call>
"""

from __future__ import annotations

from sapwood.text.tools.qwen3_coder import Qwen3Coder


class MiMo(Qwen3Coder):
    name = "mimo"
    trims_alone = False
