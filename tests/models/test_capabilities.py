from __future__ import annotations

from sapwood.models.capabilities import capabilities
from sapwood.models.encoder.names import ENCODERS
from sapwood.models.registry import ARCHITECTURES
from sapwood.models.text_part import WRAPPERS
from sapwood.store.gguf_architectures import ARCHITECTURES as GGUF
from sapwood.store.gguf_mixtures import MIXTURES


def test_what_works_is_found_by_building_each_architecture() -> None:
    found = {one.name: one for one in capabilities()}
    assert found.keys() == {*ARCHITECTURES.names(), *WRAPPERS} - set(ENCODERS)
    assert {file for one in found.values() for file in one.gguf} == {*GGUF, *MIXTURES}
    llama, phi3 = found["LlamaForCausalLM"], found["Phi3ForCausalLM"]
    assert (llama.gguf, llama.is_recorded, llama.converts) == (
        ("llama", "internlm2"),
        True,
        True,
    )
    assert (phi3.models, phi3.converts) == ("Phi-3, Phi-3.5 and Phi-4", True)
    assert not found["Gemma3nForCausalLM"].is_recorded
    assert found["MixtralForCausalLM"].gguf == ("llama",)
    assert not found["GPT2LMHeadModel"].converts
