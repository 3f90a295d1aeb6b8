"""Where the server may listen: the rule for ``host:port``, and who can reach a host."""

from __future__ import annotations

import ipaddress
import re
from typing import Final

from modelyard_server.config.problems import quoted
from modelyard_server.config.rules import RuleError, text_of

__all__ = [
    "is_loopback",
    "listen_address",
    "optional_listen_address",
    "split_listen_address",
]

_HOST_NAME: Final = re.compile(
    r"(?=.{1,253}$)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9-]+)*"
)
_NUMERIC_END: Final = re.compile(r"(.*\.)?[0-9]+")


def listen_address(value: object) -> str:
    """Accept ``host:port``."""
    text = text_of(value)
    split_listen_address(text)
    return text


def optional_listen_address(value: object) -> str:
    """Accept ``host:port``, or empty text for none."""
    return listen_address(value) if text_of(value) else ""


def split_listen_address(text: str) -> tuple[str, int]:
    """Split ``host:port`` into the host, without brackets, and the port.

    Raises:
        RuleError: ``text`` is no such address.
    """
    host, separator, port_text = text.rpartition(":")
    if not separator or not host:
        raise RuleError(f'must be "host:port", for example "127.0.0.1:8470", got {quoted(text)}')
    if not re.fullmatch("[0-9]{1,5}", port_text) or int(port_text) > 65535:
        raise RuleError(f"must end in a port from 0 to 65535, got {quoted(port_text)}")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        if _ip_address(host, version=6) is None:
            raise RuleError(f"must have an IPv6 address between brackets, got {quoted(host)}")
    elif ":" in host:
        raise RuleError(f'must have an IPv6 address in brackets, as in "[::1]:{port_text}"')
    elif _ip_address(host, version=4) is None and (
        not _HOST_NAME.fullmatch(host) or _NUMERIC_END.fullmatch(host)
    ):
        raise RuleError(
            f"must have an IP address or a host name before the port, got {quoted(host)}"
        )
    return host, int(port_text)


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a host, an IP address or a name."""
    if host.lower() == "localhost":
        return True
    address = _ip_address(host, version=4) or _ip_address(host, version=6)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped.is_loopback
    return address is not None and address.is_loopback


def _ip_address(host: str, *, version: int) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.IPv4Address(host) if version == 4 else ipaddress.IPv6Address(host)
    except ValueError:
        return None
