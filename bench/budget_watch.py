"""Looks at a running server's devices from outside, all the time, and at everything it reports."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any, Final

import grpc
import grpc.aio

from bench.audited_server import may_hold
from modelyard.v1 import (
    admin_service_pb2,
    admin_service_pb2_grpc,
    device_pb2,
    device_service_pb2,
    device_service_pb2_grpc,
    event_pb2,
)

__all__ = ["BudgetWatch", "watching"]

_PAUSE_S: Final = 0.01
"""Between two looks: without one they would be half of the server's load."""

_MOST_TEXTS: Final = 20


class BudgetWatch:
    """Counts looks, and those that saw a device hold more than it may.

    Attributes:
        samples: looks at one device.
        over: those that saw too much.
        events: events that the server reported.
        texts: what was wrong, the first of it.
        most_over_bytes: the most that a device has held above a budget that was lowered.
    """

    def __init__(self) -> None:
        self.samples = 0
        self.over = 0
        self.events = 0
        self.texts: list[str] = []
        self.most_over_bytes = 0
        self._before: dict[str, tuple[int, int]] = {}

    def look(self, device: device_pb2.ManagedDevice) -> None:
        """Looks at a device.

        Between two looks much can have happened, but only a lowered budget can have left a device
        above its budget, and then with no more than the old budget allowed.
        """
        self.samples += 1
        held = (
            device.reserved_bytes
            + device.resident_bytes
            + device.draining_bytes
            + device.quarantined_bytes
        )
        budget, held_before = self._before.get(device.name, (0, 0))
        found = []
        if held > may_hold(device.budget_bytes, max(budget, held_before)):
            found.append(f"holds {held} of {device.budget_bytes} bytes")
        if held > device.budget_bytes + device.deficit_bytes:
            found.append(f"its deficit is only {device.deficit_bytes} bytes")
        if device.measured_bytes > held:
            found.append(f"{device.measured_bytes} bytes are there, {held} are accounted for")
        if found:
            self.over += 1
            self._note(f"{device.name}: {'; '.join(found)}")
        self.most_over_bytes = max(self.most_over_bytes, held - device.budget_bytes)
        self._before[device.name] = (device.budget_bytes, held)

    def hear(self, response: admin_service_pb2.WatchEventsResponse) -> None:
        """Takes what the server reports."""
        if response.truncated:
            self.over += 1
            self._note("events were missed: nobody knows what they told")
        for event in response.events:
            self.events += 1
            if event.type == event_pb2.EVENT_TYPE_OVERSHOOT:
                self.over += 1
                self._note(f"{event.subject} is {event.size_bytes} bytes larger than was reserved")

    def _note(self, text: str) -> None:
        if len(self.texts) < _MOST_TEXTS:
            self.texts.append(text)


@asynccontextmanager
async def watching(target: str) -> AsyncIterator[BudgetWatch]:
    """Watches a server until the block ends."""
    watch = BudgetWatch()
    options = [("grpc.enable_http_proxy", 0), ("modelyard.bench_client", -1)]
    async with grpc.aio.insecure_channel(target, options=options) as channel:
        devices: Any = device_service_pb2_grpc.DeviceServiceStub(channel)
        admin: Any = admin_service_pb2_grpc.AdminServiceStub(channel)

        async def look() -> None:
            request = device_service_pb2.ListDevicesRequest()
            while True:
                for device in (await devices.ListDevices(request)).devices:
                    watch.look(device)
                await asyncio.sleep(_PAUSE_S)

        async def hear() -> None:
            async for response in admin.WatchEvents(admin_service_pb2.WatchEventsRequest()):
                watch.hear(response)

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(look(), name="look at the devices"),
                group.create_task(hear(), name="hear of events"),
            ]
            yield watch
            for task in tasks:
                task.cancel()
