"""What callers of `sapwood.LLM` may give for a prompt, for several, and for each of several."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import Any

from sapwood.app.offline.sampling import Sampling
from sapwood.base.errors import InvalidRequest

Prompt = str | Sequence[int]


def as_prompts(prompts: Prompt | Sequence[Prompt]) -> list[str | list[int]]:
    """One prompt or several, each a text or token ids. InvalidRequest for anything else."""
    if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
        return [as_prompt(prompts)]
    many: list[Any] = list(prompts)
    if many and isinstance(many[0], Integral):
        return [as_prompt(many)]
    return [as_prompt(prompt, f"prompts[{index}]") for index, prompt in enumerate(many)]


def as_prompt(prompt: Any, name: str = "the prompt") -> str | list[int]:
    """One prompt; `name` is what an error calls it."""
    if isinstance(prompt, str):
        return prompt
    found = f"a {type(prompt).__name__}"
    if isinstance(prompt, Iterable) and not isinstance(prompt, bytes | Mapping):
        token_ids: list[Any] = list(prompt)
        others = [token_id for token_id in token_ids if not isinstance(token_id, Integral)]
        if not others:
            return [int(token_id) for token_id in token_ids]
        found += f" with a {type(others[0]).__name__} in it"
    raise InvalidRequest(
        f"{name} must be a text or a list of token ids, not {found}", param="prompt"
    )


def adapter_of_each(lora_path: str | Sequence[str | None] | None, count: int) -> list[str | None]:
    """The adapter of each of `count` prompts, given for all or for each."""
    if lora_path is None or isinstance(lora_path, str):
        return [lora_path] * count
    if len(lora_path) != count:
        raise InvalidRequest(f"{len(lora_path)} adapters for {count} prompts", param="lora_path")
    return list(lora_path)


def sampling_of_each(sampling: Sampling | Sequence[Sampling], count: int) -> list[Sampling]:
    """The sampling parameters of each of `count` prompts, given for all or for each."""
    if sampling is None or isinstance(sampling, Mapping) or not isinstance(sampling, Sequence):
        return [sampling] * count
    if len(sampling) != count:
        raise InvalidRequest(f"{len(sampling)} sampling parameters for {count} prompts")
    return list(sampling)
