"""gpt-oss: the thinking is the text in Harmony's analysis channel."""

from __future__ import annotations

from sapwood.text.reasoning.format import ReasoningFormat, Shown
from sapwood.text.source import Source, Steps
from sapwood.text.tools.harmony import CHANNEL, END, MESSAGE, START, Harmony

_FINAL = f"{CHANNEL}final{MESSAGE}"


class HarmonyReasoning(ReasoningFormat):
    tags = Harmony.tags
    opens = f"{CHANNEL}analysis{MESSAGE}"
    closes = _FINAL
    forced_close = f"{END}{START}assistant{_FINAL}"
    tool_format = Harmony.name

    @property
    def ends(self) -> str:
        return END

    def shown_by(self, prompt: str, *, prefix: str = "") -> Shown:
        """Always open: no grammar can begin before the header of the final message."""
        last_message = prompt[prompt.rfind(START) :] if START in prompt else ""
        return Shown.CLOSED if _FINAL in last_message else Shown.OPEN

    def parse(self, source: Source, *, is_thinking: bool) -> Steps[None]:
        raise AssertionError("the machine of its calls takes the thinking apart")
        yield


GPT_OSS = HarmonyReasoning()
