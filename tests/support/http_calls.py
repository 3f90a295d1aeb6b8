"""Calls over HTTP as they are on the wire: one connection each, nothing added, nothing hidden."""

from __future__ import annotations

import http.client
import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Answer", "frame", "frames_of", "post", "trailers_of"]

_PATIENCE_S = 60
TRAILERS = 0x80
END_OF_STREAM = 0x02


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An HTTP response.

    Attributes:
        status: its status.
        headers: its headers, names in lower case.
        body: the whole of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body, read as JSON."""
        return json.loads(self.body)


def post(
    port: int,
    path: str,
    body: bytes | str | Mapping[str, Any],
    content_type: str = "application/json",
    *,
    method: str = "POST",
    **headers: str,
) -> Answer:
    """Sends a request to this machine and returns the answer.

    Args:
        port: where.
        path: which method.
        body: as it goes; a mapping goes as JSON.
        content_type: of the body.
        method: of HTTP.
        headers: others, with "_" for "-".
    """
    data = json.dumps(body) if isinstance(body, Mapping) else body
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_PATIENCE_S)
    try:
        sent = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method, path, data, {"content-type": content_type, **sent})
        with connection.getresponse() as response:
            return Answer(
                status=response.status,
                headers={name.lower(): value for name, value in response.getheaders()},
                body=response.read(),
            )
    finally:
        connection.close()


def frame(message: bytes) -> bytes:
    """A message as gRPC-Web and Connect's streams have it."""
    return struct.pack(">BI", 0, len(message)) + message


def frames_of(body: bytes) -> list[tuple[int, bytes]]:
    """Flags and content of each frame of a body, which must hold whole ones."""
    frames: list[tuple[int, bytes]] = []
    while body:
        flags, size = struct.unpack(">BI", body[:5])
        assert len(body) >= 5 + size, "a frame is cut off"
        frames.append((flags, body[5 : 5 + size]))
        body = body[5 + size :]
    return frames


def trailers_of(content: bytes) -> dict[str, str]:
    """The trailers in gRPC-Web's last frame."""
    lines = content.decode("ascii").split("\r\n")
    return dict(line.split(": ", 1) for line in lines if line)
