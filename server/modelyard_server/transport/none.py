"""The transport of a server that is called in its own process: none."""

from __future__ import annotations

__all__ = ["NoTransport"]


class NoTransport:
    """Carries nothing. Has what an application asks of its transport."""

    async def start(self, address: str) -> int:
        """Refuses: RuntimeError."""
        raise RuntimeError(f"this server is called in its process, and cannot listen on {address}")

    @property
    def is_healthy(self) -> bool:
        """True: there is nobody who would have to go elsewhere."""
        return True

    async def stop_being_healthy(self) -> None:
        """Does nothing: nobody watches."""

    async def stop(self, grace_s: float) -> None:
        """Does nothing: whoever makes the calls knows which run."""
