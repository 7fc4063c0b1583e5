"""The messages between a comparison and its peers' processes: JSON, one message a line."""

from __future__ import annotations

import msgspec

from sapwood.bench.peers.interface import PeerSetup


class Start(msgspec.Struct, frozen=True, tag=True):
    """The first line to a process; `peer` names the kind of peer that it must open."""

    peer: str
    setup: PeerSetup


class PeerRequest(msgspec.Struct, frozen=True):
    prompt_ids: list[int]
    num_output_tokens: int


class Run(msgspec.Struct, frozen=True, tag=True):
    """Run these phases and time them."""

    phases: list[list[PeerRequest]]


class Ready(msgspec.Struct, frozen=True, tag=True):
    """The model is loaded."""

    versions: dict[str, str]


class Done(msgspec.Struct, frozen=True, tag=True, kw_only=True):
    """Answers a `Run`.

    peak_rss_bytes  peak of resident memory of the process and its children since the start
    """

    phase_s: list[float]
    num_output_tokens: list[int]
    num_cached_tokens: list[int]
    peak_rss_bytes: int


class Failed(msgspec.Struct, frozen=True, tag=True):
    """The last line of a process that cannot go on."""

    message: str


ToPeer = Start | Run
FromPeer = Ready | Done | Failed
_to_peer: msgspec.json.Decoder[ToPeer] = msgspec.json.Decoder(ToPeer)
_from_peer: msgspec.json.Decoder[FromPeer] = msgspec.json.Decoder(FromPeer)
decode_to_peer = _to_peer.decode
decode_from_peer = _from_peer.decode
encode = msgspec.json.Encoder().encode
