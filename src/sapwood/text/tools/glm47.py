"""GLM 4.7: like GLM 4.5, without line breaks; either parser reads both.

<tool_call>NAME<arg_key>k</arg_key><arg_value>v</arg_value></tool_call>
"""

from __future__ import annotations

from sapwood.text.tools.glm45 import Glm45


class Glm47(Glm45):
    name = "glm47"
