"""What is known of an architecture of GGUF files. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from sapwood.store import gguf_fields


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """The Hugging Face counterpart of a GGUF architecture.

    known_as     further architectures in Hugging Face's spelling from which such files are made
    permuted     whether rows of the query and key projections are in llama.cpp's order of rotary
                 pairs
    adds_one     whether weights of norms are larger by 1 than in Hugging Face's files
    norm         "rms", "layer" or "rms or layer": whose epsilon the file has
    activation   hidden_act
    has_windows  whether a sliding window is served; others refuse a file that has one
    mixes        whether layers with 0 key and value heads have another mixer than attention, and
                 those with a size of 0 no feed-forward
    differs      whether layers may have different heads and sizes, and 0 for none
    tiles_heads  whether value heads of gated delta nets are in the order in which llama.cpp repeats
                 key heads: the first of each key head, then the second of each
    layers       name of all layers in Hugging Face's files
    names        other parts of tensor names that differ from Llama's, GGUF's -> Hugging Face's;
                 some with the kind ("ssm_dt.bias"), and some have none ("ssm_a")
    reads        metadata that `more` reads, and that is refused for others
    more         further fields of config.json
    """

    class_name: str
    model_type: str
    known_as: tuple[str, ...] = ()
    permuted: bool = False
    adds_one: bool = False
    norm: str = "rms"
    activation: str = "silu"
    has_windows: bool = False
    mixes: bool = False
    differs: bool = False
    tiles_heads: bool = False
    layers: str = "model.layers"
    names: Mapping[str, str] = field(default_factory=dict)
    reads: tuple[str, ...] = ()
    more: gguf_fields.MoreFields = gguf_fields.none
