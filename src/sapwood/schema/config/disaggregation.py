"""One engine reads prompts, another one generates: which part this one has, and how pages move."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from enum import StrEnum

from sapwood.base.errors import ConfigError
from sapwood.schema.config.options import check_options, option
from sapwood.schema.handover import DEFAULT_PORT
from sapwood.schema.limits import HOST


class Part(StrEnum):
    """What an engine does with requests that name a room.

    WHOLE    refuses them
    PREFILL  reads their prompts, and hands the pages over
    DECODE   takes the pages, and generates
    """

    WHOLE = "null"
    PREFILL = "prefill"
    DECODE = "decode"


_NO_LIBRARY = "is not called by sapwood; take auto, tcp or shared_memory"
_OTHER_BACKENDS = {
    "mooncake": f"Mooncake {_NO_LIBRARY}",
    "nixl": f"NIXL {_NO_LIBRARY}",
    "ascend": f"Ascend's transfer engine {_NO_LIBRARY}",
    "mori": f"MORI {_NO_LIBRARY}",
}
LOOPBACK = ("127.0.0.0/8", "::1")


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggregationConfig:
    """Prompts are read by one engine, and answered by another."""

    disaggregation_mode: str = option(
        "null",
        "prefill: this engine reads the prompts of requests that name a room (bootstrap_room), and "
        "hands their pages to the engine that answers them. decode: it is that engine. null: "
        "neither.",
        choices=tuple(Part),
    )
    disaggregation_bootstrap_port: int = option(
        DEFAULT_PORT,
        "The port of an engine that reads prompts at which pages are asked for (bootstrap_port).",
    )
    disaggregation_bootstrap_host: str | None = option(
        None,
        "The address at which that port listens; by default that of --host. Whoever reaches it and "
        "knows a room and its prompt gets the prompt's pages.",
    )
    disaggregation_transfer_backend: str = option(
        "auto",
        "How pages move: shared_memory, between two engines of one user on one machine; tcp, over "
        "a connection; auto, shared_memory where it is possible, else tcp; fake, not at all, for "
        "tests: the engine that generates reads the prompt itself.",
        choices=("auto", "tcp", "shared_memory", "fake"),
        lacking=_OTHER_BACKENDS,
    )
    disaggregation_prefill_hosts: str | None = option(
        None,
        "Hosts from which an engine that generates may fetch pages: names as requests spell them "
        "(bootstrap_host), addresses, or networks such as 10.0.0.0/8. By default only this "
        "machine's own (localhost): what such a host sends is believed.",
        many=True,
    )
    disaggregation_checksums: bool = option(
        False, "Check each page's bytes by a sum (CRC-32) after they have moved."
    )
    num_reserved_decode_tokens: int = option(
        512,
        "An engine that generates keeps room for so many further tokens of each running request "
        "when it lets another one begin.",
        unit="tokens",
    )
    disaggregation_decode_polling_interval: int = option(
        1,
        "An engine that generates looks for pages that have come once in so many steps.",
        unit="steps",
    )

    def __post_init__(self) -> None:
        check_options(self)
        if not 0 <= self.disaggregation_bootstrap_port < 2**16:
            raise ConfigError(
                f"--disaggregation-bootstrap-port is {self.disaggregation_bootstrap_port} but must "
                "be from 0 (any free port) to 65535"
            )
        if not 0 <= self.num_reserved_decode_tokens <= 1 << 30:
            raise ConfigError(
                f"--num-reserved-decode-tokens is {self.num_reserved_decode_tokens} but must be "
                "from 0 to 2**30"
            )
        if not 1 <= self.disaggregation_decode_polling_interval <= 10_000:
            raise ConfigError(
                "--disaggregation-decode-polling-interval is "
                f"{self.disaggregation_decode_polling_interval} but must be from 1 to 10000"
            )
        for host in self.prefill_hosts:
            _network(host)

    @property
    def part(self) -> Part:
        return Part(self.disaggregation_mode)

    @property
    def prefill_hosts(self) -> tuple[str, ...]:
        """Of --disaggregation-prefill-hosts."""
        given = self.disaggregation_prefill_hosts or ""
        return tuple(host.lower() for host in given.replace(",", " ").split())

    @property
    def given_in_vain(self) -> list[str]:
        """Flags that were given though this engine has no part of them."""
        own = {
            Part.WHOLE: set[str](),
            Part.PREFILL: {"bootstrap_port", "bootstrap_host", "transfer_backend"},
            Part.DECODE: {"transfer_backend", "prefill_hosts", "checksums"}
            | {"num_reserved_decode_tokens", "decode_polling_interval"},
        }[self.part] | {"mode"}
        return [
            "--" + one.name.replace("_", "-")
            for one in fields(self)
            if one.name.removeprefix("disaggregation_") not in own
            and getattr(self, one.name) != one.default
        ]

    def why_not_from(self, host: str) -> str:
        """Why pages may not be fetched from that host; "" if they may."""
        name = host.lower()
        if name == "localhost" or name in self.prefill_hosts:
            return ""
        try:
            address = ipaddress.ip_address(name.strip("[]"))
        except ValueError:
            networks = []
        else:
            networks = [_network(one) for one in (*LOOPBACK, *self.prefill_hosts)]
            networks = [one for one in networks if one is not None and address in one]
        if networks:
            return ""
        return (
            f"bootstrap_host is {host[:80]!r}, from which this server fetches no pages; it is "
            "started with --disaggregation-prefill-hosts, which lists the hosts that it may ask"
        )


def _network(host: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    """The network that is meant; None: it is a name. ConfigError if it is neither"""
    try:
        return ipaddress.ip_network(host, strict=False)
    except ValueError:
        pass
    allowed = set("abcdefghijklmnopqrstuvwxyz0123456789-._")
    if len(host) > HOST.most or not set(host) <= allowed:
        raise ConfigError(
            f"--disaggregation-prefill-hosts has {host[:80]!r}, which is neither a host's name nor "
            "an address nor a network"
        )
    return None
