"""The compared peers: the names in `--peers`, and their settings in `--peers-file`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from sapwood.base.errors import ConfigError
from sapwood.bench.peers.interface import PEERS, OptionValue


class PeerSpec(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One peer of a comparison; in the file, a mapping under its name.

    kind     the entry of PEERS that opens the peer; None: the peer's name
    python   interpreter with the peer's packages; None: this interpreter
    model    model that the peer loads instead of the common checkpoint, for instance in its own
             format; None: the common checkpoint
    options  settings that are passed to the peer; each kind has its own
    """

    kind: str | None = None
    python: str | None = None
    model: str | None = None
    options: dict[str, OptionValue] = {}


def peer_specs(names: Sequence[str], file: Path | None) -> dict[str, PeerSpec]:
    """The peers to compare, by name.

    Raises ConfigError, with the peer or entry, for unknown kinds or fields and wrong types.
    """
    described = {} if file is None else _read(file)
    specs = {}
    for name in names:
        spec = described.get(name, PeerSpec())
        kind = spec.kind or name
        if kind not in PEERS.names():
            known = sorted({*PEERS.names(), *described})
            raise ConfigError(
                f"unknown peer {name!r}; known: {', '.join(known)}. "
                f"--peers-file describes others, each of a kind: {', '.join(PEERS.names())}"
            )
        specs[name] = msgspec.structs.replace(spec, kind=kind)
    return specs


def _read(file: Path) -> Mapping[str, PeerSpec]:
    try:
        return msgspec.yaml.decode(file.expanduser().read_bytes(), type=dict[str, PeerSpec])
    except (OSError, msgspec.MsgspecError) as error:
        raise ConfigError(f"--peers-file {file}: {error}") from error
