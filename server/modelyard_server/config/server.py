"""How the server is reached: ``[server]`` and ``[http]``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from modelyard_server.config import addresses, rules
from modelyard_server.config.problems import quoted
from modelyard_server.config.rules import Finding
from modelyard_server.config.sections import DAY_S, ascending, check, ruled

__all__ = ["HttpConfig", "ServerConfig"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """How the server is reached and how long it waits: ``[server]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    listen: str = field(default="127.0.0.1:8470", metadata=ruled(addresses.listen_address))
    """``host:port`` of the listener; port 0 lets the system choose one."""
    insecure_non_loopback: bool = field(default=False, metadata=ruled(rules.boolean))
    """Whether ``listen`` may be reachable from other machines, without encryption or identity."""
    default_deadline_s: float = field(default=30.0, metadata=ruled(rules.seconds(0.001, DAY_S)))
    """Deadline of a request that brings none, in seconds."""
    max_deadline_s: float = field(default=300.0, metadata=ruled(rules.seconds(0.001, DAY_S)))
    """Longest deadline a request can have, in seconds; longer ones are shortened to it."""
    max_message_bytes: int = field(
        default=16 * 1024**2, metadata=ruled(rules.size(64 * 1024, 2**31 - 1))
    )
    """Largest request message, in bytes."""
    shutdown_grace_s: float = field(default=10.0, metadata=ruled(rules.seconds(0, 3600)))
    """How long running requests may go on after SIGTERM, in seconds."""
    log_level: str = field(
        default="info", metadata=ruled(rules.one_of("debug", "info", "warning", "error"))
    )
    """The least level that is logged."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def host(self) -> str:
        """Host of ``listen``, an IPv6 address without its brackets."""
        return addresses.split_listen_address(self.listen)[0]

    @property
    def port(self) -> int:
        """Port of ``listen``."""
        return addresses.split_listen_address(self.listen)[1]

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        yield from _exposed(given)
        yield from ascending(given, "default_deadline_s", "max_deadline_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpConfig:
    """The same services over HTTP, for clients without gRPC: ``[http]``.

    Raises:
        ValueError: a field breaks its rule, or two contradict each other.
    """

    listen: str = field(default="", metadata=ruled(addresses.optional_listen_address))
    """``host:port`` of the listener; port 0 lets the system choose one. Empty: none."""
    insecure_non_loopback: bool = field(default=False, metadata=ruled(rules.boolean))
    """Whether ``listen`` may be reachable from other machines, without encryption or identity."""
    origins: tuple[str, ...] = field(default=(), metadata=ruled(rules.origins))
    """Web pages, by their origin, whose scripts may call. Requests of all others are refused."""

    def __post_init__(self) -> None:
        check(self)

    @property
    def host(self) -> str:
        """Host of ``listen``, an IPv6 address without its brackets; empty if there is none."""
        return addresses.split_listen_address(self.listen)[0] if self.listen else ""

    @staticmethod
    def conflicts(given: Mapping[str, Any]) -> Iterator[Finding]:
        """See ``Section``."""
        if given.get("listen"):
            yield from _exposed(given)


def _exposed(given: Mapping[str, Any]) -> Iterator[Finding]:
    """Yield what is wrong with a listener that other machines reach without anybody wanting it."""
    if not {"listen", "insecure_non_loopback"} <= given.keys():
        return
    host, _ = addresses.split_listen_address(given["listen"])
    if not given["insecure_non_loopback"] and not addresses.is_loopback(host):
        yield (
            ("listen",),
            f"{quoted(host)} may be reached from other machines, and there is no TLS yet: "
            "listen on 127.0.0.1 behind a proxy that does TLS, or set "
            "insecure_non_loopback = true if the network is closed",
        )
