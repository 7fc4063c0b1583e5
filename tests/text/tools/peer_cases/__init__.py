"""What SGLang's tests of its detectors demand, as data: which text, which calls, which content."""

from tests.text.tools.peer_cases.between_tags import (
    gpt_oss_cases,
    json_between_tags_cases,
    llama_cases,
    mistral_cases,
    pythonic_cases,
)
from tests.text.tools.peer_cases.case import Case
from tests.text.tools.peer_cases.elements import (
    glm_cases,
    json_array_cases,
    minimax_cases,
    qwen3_coder_cases,
)
from tests.text.tools.peer_cases.kimi_and_deepseek import deepseek_cases, kimi_cases

CASES = [
    *pythonic_cases(),
    *mistral_cases(),
    *json_between_tags_cases(),
    *llama_cases(),
    *kimi_cases(),
    *deepseek_cases(),
    *qwen3_coder_cases(),
    *glm_cases(),
    *json_array_cases(),
    *minimax_cases(),
    *gpt_oss_cases(),
]

__all__ = ["CASES", "Case"]
